"""`hf-distill generate`: from a recipe to a data set that a run trains on as it is."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import yaml
from servers.teacher_servers import CompletionServer
from tiny import build

from hf_distill.cli.commands.generate import _training_command
from hf_distill.core.targets import IGNORE_INDEX
from hf_distill.data import load_examples
from hf_distill.errors import DistillError
from hf_distill.generation.backends import local
from hf_distill.recipe.data import Source
from hf_distill.recipe.load import load_recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.generate import generate_data
from hf_distill.runner.model_loading import LoadPolicy, load_policy, resolve_model
from hf_distill.runner.tasks import task_of

CONVERSATIONS = [
    {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i}"},
            {"role": "user", "content": "and then?"},
            {"role": "assistant", "content": f"reference {i}"},
        ],
        "level": i,
    }
    for i in range(5)
]
TEXTS = [{"prompt": f"text {i}", "completion": f" reference {i}"} for i in range(5)]


@pytest.fixture
def recipe_of(tmp_path):
    """`recipe_of(rows, samples=2)`: a recipe with tiny models, data and a section `generate`."""

    def make(rows, name="data", changes=(), **generate):
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        values = {
            "student": {"model": "smoke:llama/student"},
            "teacher": {"model": "smoke:llama/teacher"},
            "data": {"task": {"path": str(file)}, "eval": {"holdout": 0.2}, "max_length": 256},
            "generate": {"max_new_tokens": 6, "prompts_per_part": 2, "batching": "padded", **generate},
            "train": {"output_dir": str(tmp_path / "run"), "max_steps": 1, "use_cpu": True},
        }
        values["generate"] = {key: value for key, value in values["generate"].items() if value is not None}
        recipe = tmp_path / f"{name}.yaml"
        recipe.write_text(yaml.safe_dump(values))
        return load_recipe(str(recipe), list(changes))

    return make


def rows_of(folder) -> list[dict]:
    return list(load_examples(str(folder)))


@pytest.mark.parametrize("rows", [CONVERSATIONS, TEXTS], ids=["conversations", "texts"])
def test_a_run_trains_on_the_completions_and_on_nothing_else(rows, recipe_of, tmp_path):
    recipe = recipe_of(rows, samples=2)
    data = generate_data(recipe, str(tmp_path / "out"))
    generated = rows_of(data.folder)
    assert data.completions == data.rows == len(generated) == 10
    assert [(row["row"], row["sample"]) for row in generated] == [(i, j) for i in range(5) for j in range(2)]
    assert [row["reference"].strip() for row in generated[::2]] == [f"reference {i}" for i in range(5)]
    if rows is CONVERSATIONS:
        assert generated[0]["prompt"] == CONVERSATIONS[0]["messages"][:3]
        assert [row["level"] for row in generated[::2]] == [*range(5)]
    trained = recipe_of(rows, changes=[f"data.task.path={data.folder}"])
    task = task_of(trained)
    tokenizer = task.load_processor()
    prepared = task.prepare_data(tokenizer, 0, 1)
    for row in prepared.train:
        target = tokenizer.decode([i for i in row["labels"] if i != IGNORE_INDEX], skip_special_tokens=True)
        assert target in [row["completion"] if rows is TEXTS else row["completion"][0]["content"] for row in generated]
    assert len(prepared.train) == 8


def test_an_interrupted_generation_resumes_to_the_same_rows(recipe_of, tmp_path, monkeypatch):
    recipe = recipe_of(CONVERSATIONS, samples=2, temperature=0.8)
    generate_data(recipe, str(tmp_path / "whole"))
    generated_parts = []
    complete = local.TransformersBackend.complete

    def interrupted(self, parts, on_tokens):
        for part, completions in complete(self, parts, on_tokens):
            if len(generated_parts) == 2:
                raise KeyboardInterrupt
            generated_parts.append(part.number)
            yield part, completions

    with monkeypatch.context() as patch:
        patch.setattr(local.TransformersBackend, "complete", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate_data(recipe, str(tmp_path / "out"))
    with pytest.raises(DistillError, match=r"unfinished data set of `hf-distill generate`.*--resume"):
        rows_of(tmp_path / "out")
    progress = []
    generate_data(recipe, str(tmp_path / "out"), resume=True, on_progress=progress.append)
    assert rows_of(tmp_path / "out") == rows_of(tmp_path / "whole")
    assert generated_parts == [0, 1]
    assert (progress[0].completions, progress[-1].completions, progress[-1].total) == (10, 10, 10)
    with pytest.raises(
        DistillError, match=r"of another recipe or data: generate.temperature is 0.7 here and 0.8 there"
    ):
        generate_data(recipe_of(CONVERSATIONS, samples=2, temperature=0.7), str(tmp_path / "out"), resume=True)
    changed = recipe_of([*CONVERSATIONS[1:], CONVERSATIONS[0]], samples=2, temperature=0.8)
    with pytest.raises(DistillError, match=r"of another recipe or data: digest is"):
        generate_data(changed, str(tmp_path / "out"), resume=True)


THINKING = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% if not enable_thinking|default(true) %}<think></think>{% endif %}"
    "{% endif %}"
)


@pytest.mark.parametrize("variables", [{}, {"enable_thinking": True}, {"enable_thinking": False}])
def test_the_teacher_reads_prompts_that_are_rendered_with_the_variables_of_the_template(variables, recipe_of, tmp_path):
    (tmp_path / "thinking.jinja").write_text(THINKING)
    changes = [f"data.chat_template={tmp_path / 'thinking.jinja'}"]
    seen = []
    recipe = recipe_of(CONVERSATIONS, changes=changes, chat_template_kwargs=variables)
    with pytest.MonkeyPatch.context() as patch:
        padded = local.TransformersBackend._padded
        patch.setattr(
            local.TransformersBackend,
            "_padded",
            lambda self, prompts, *rest: (
                seen.extend(self._decode(ids) for ids in prompts) or padded(self, prompts, *rest)
            ),
        )
        generate_data(recipe, str(tmp_path / "out"))
    assert len(seen) == 5
    assert {text.endswith("assistant: <think></think>") for text in seen} == {variables == {"enable_thinking": False}}
    with pytest.raises(DistillError, match=r"chat_template_kwargs: .*'enable_thinkin'; it reads enable_thinking"):
        generate_data(
            recipe_of(CONVERSATIONS, changes=changes, chat_template_kwargs={"enable_thinkin": True}),
            str(tmp_path / "b"),
        )
    with pytest.raises(DistillError, match=r"chat_template_kwargs: tools cannot be set here"):
        recipe_of(CONVERSATIONS, chat_template_kwargs={"tools": []})


def test_a_server_receives_the_system_prompt_and_the_data_set_does_not_contain_it(recipe_of, tmp_path):
    tokenizer = byte_tokenizer()
    options = {"backend": "server", "system_prompt": "Be brief.", "chat": True, "reasoning": "column"}
    options["chat_template_kwargs"] = {"enable_thinking": True}
    with CompletionServer(build("llama", vocab=len(tokenizer)), tokenizer=tokenizer, context=128) as server:
        server.separates_reasoning = True
        recipe = recipe_of(TEXTS, **options, url=server.url, batching=None)
        data = generate_data(recipe, str(tmp_path / "out"))
        sent = [body["messages"] for body in server.bodies("/v1/chat/completions")]
        variables = [body["chat_template_kwargs"] for body in server.bodies("/v1/chat/completions")]
    assert variables == [{"enable_thinking": True}] * 5
    assert all(messages[0] == {"role": "system", "content": "Be brief."} for messages in sent)
    rows = rows_of(data.folder)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": f"text {i}"}] for i in range(5)]
    assert {row["reasoning"] for row in rows} == {"thoughts"}
    text = "".join(file.read_text() for file in (data.folder / "README.md", data.folder / "generation.json"))
    assert server.url.removeprefix("http://") not in text


def test_a_column_of_prompts_leaves_the_other_columns_for_filters(recipe_of, tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}", "prompt": "other", "input_ids": [1]} for i in range(5)]
    filters = [{"name": "reference", "column": "answer", "compare": "exact"}]
    recipe = recipe_of(rows, changes=["data.task.column=question"])
    data = generate_data(recipe, str(tmp_path / "out"))
    assert [(row["prompt"], row["answer"]) for row in rows_of(data.folder)] == [(f"q{i}", f"a{i}") for i in range(5)]
    assert "input_ids" not in rows_of(data.folder)[0]
    recipe = recipe_of(rows, changes=["data.task.column=question"], filters=filters)
    with pytest.raises(DistillError, match=r"reference.*5"):  # of random text nothing is left
        generate_data(recipe, str(tmp_path / "filtered"))


def test_the_card_states_model_settings_and_counts(recipe_of, tmp_path):
    data = generate_data(recipe_of(TEXTS, temperature=0.5), str(tmp_path / "out"))
    card = (data.folder / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": "data/*.parquet"}]
    lines = card.splitlines()
    for line in (
        "| prompts | 5 |",
        "| completions | 5 |",
        "| temperature | 0.5 |",
        f"| generated tokens | {data.tokens} |",
    ):
        assert line in lines
    assert "The license of the model may restrict the use of its outputs" in card


def test_columns_whose_names_the_data_set_uses_are_named(recipe_of, tmp_path, caplog):
    """A source may have columns `reference`, `score` and `set_aside_by` of its own."""
    rows = [{**row, "reference": "mine", "score": 1, "set_aside_by": "", "level": i} for i, row in enumerate(TEXTS)]
    data = generate_data(recipe_of(rows, samples=2, select="best_of_n"), str(tmp_path / "out"))
    assert "The sources have the columns reference, score, set_aside_by, and the data set has other" in caplog.text
    assert [row["reference"] for row in rows_of(data.folder)] == [row["completion"] for row in TEXTS]
    card = (data.folder / "README.md").read_text()
    assert "| score | score by which the completion was selected |" in card
    caplog.clear()
    data = generate_data(recipe_of([*rows], samples=2), str(tmp_path / "all"))
    assert "The sources have the columns reference, and" in caplog.text
    assert {row["score"] for row in rows_of(data.folder)} == {1}
    assert "| score | of the source |" in (data.folder / "README.md").read_text()
    caplog.clear()
    alone = [{key: row[key] for key in ("prompt", "reference", "level")} for row in rows]
    data = generate_data(recipe_of(alone), str(tmp_path / "alone"))
    assert "The sources have" not in caplog.text
    assert {row["reference"] for row in rows_of(data.folder)} == {"mine"}


def test_a_complete_data_set_is_not_called_incomplete(recipe_of, tmp_path):
    generate_data(recipe_of(TEXTS), str(tmp_path / "out"))
    with pytest.raises(DistillError, match="holds a complete data set: pass --resume to keep it"):
        generate_data(recipe_of(TEXTS), str(tmp_path / "out"))


@pytest.fixture
def without_teacher(monkeypatch):
    """`without_teacher()`: from here on, no teacher can be loaded."""

    def load(*_):
        raise AssertionError("the teacher was loaded")

    return lambda: monkeypatch.setattr("hf_distill.runner.generate.local_setup", load)


@pytest.mark.parametrize("cache", [None, "top_k"])
def test_a_complete_data_set_is_resumed_without_its_teacher(cache, recipe_of, tmp_path, without_teacher):
    filters = [{"name": "length", "max_tokens": 100}]
    options = {"samples": 2, "filters": filters, "cache": cache}
    first = generate_data(recipe_of(TEXTS, **options), str(tmp_path / "out"))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.suffix}
    without_teacher()
    assert generate_data(recipe_of(TEXTS, **options), str(tmp_path / "out"), resume=True) == first
    assert {path: path.stat().st_mtime_ns for path in files} == files
    with pytest.raises(DistillError, match="holds a complete data set"):
        generate_data(recipe_of(TEXTS, **options), str(tmp_path / "out"))
    changed = [recipe_of(TEXTS, **{**options, "samples": 3}), recipe_of(TEXTS, **{**options, "filters": []})]
    if cache:  # the cache must have the rows of the training
        changed.append(recipe_of(TEXTS, changes=["data.max_length=128"], **options))
    for recipe in changed:
        with pytest.raises(AssertionError, match="was loaded"):
            generate_data(recipe, str(tmp_path / "out"), resume=True)
    if cache:
        (tmp_path / "out" / "cache" / "manifest.json").unlink()
    else:
        next((tmp_path / "out" / "data").glob("*.parquet")).unlink()
    with pytest.raises(AssertionError, match="was loaded"):
        generate_data(recipe_of(TEXTS, **options), str(tmp_path / "out"), resume=True)


def test_a_changed_function_of_the_user_filters_a_complete_data_set_again(recipe_of, tmp_path, monkeypatch):
    file = tmp_path / "judge_that_changes.py"
    file.write_text("def judge(row):\n    return True\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    options = {"filters": [{"name": "function", "function": "judge_that_changes:judge"}]}
    assert generate_data(recipe_of(TEXTS, **options), str(tmp_path / "out")).rows == 5
    file.write_text("def judge(row):\n    return row['row'] > 2\n")
    monkeypatch.delitem(sys.modules, "judge_that_changes")
    assert generate_data(recipe_of(TEXTS, **options), str(tmp_path / "out"), resume=True).rows == 2


def vllm_engines(monkeypatch):
    """Replace vLLM by a module whose engine completes nothing; return the arguments of each engine."""
    engines = []

    def engine(**options):
        engines.append(options)
        raise InterruptedError

    module = SimpleNamespace(LLM=engine, SamplingParams=dict, __spec__=object())
    monkeypatch.setitem(sys.modules, "vllm", module)
    return engines


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (LoadPolicy(), {"trust_remote_code": False, "load_format": "safetensors"}),
        (LoadPolicy(remote_code=True, pickles=True), {"trust_remote_code": True}),
    ],
)
def test_vllm_loads_what_the_policy_allows_at_the_commit_that_was_checked(
    policy, expected, hub, recipe_of, monkeypatch
):
    engines = vllm_engines(monkeypatch)
    folder = Path(resolve_model("smoke:llama/teacher"))
    commit = hub.put("models", "org/teacher", {file.name: file.read_bytes() for file in folder.iterdir()})
    recipe = recipe_of(TEXTS, changes=["teacher.model=org/teacher"], backend="vllm", batching=None)
    with load_policy(policy), pytest.raises(InterruptedError):
        generate_data(recipe, "out")
    assert engines == [{"model": "org/teacher", "revision": commit, "dtype": "auto", "max_num_seqs": 64, **expected}]


@pytest.mark.parametrize("option", ["quantization=nf4", "device_map=auto", "attn_implementation=eager"])
def test_options_of_the_teacher_that_vllm_does_not_get_are_refused(option, recipe_of, tmp_path, monkeypatch):
    engines = vllm_engines(monkeypatch)
    recipe = recipe_of(TEXTS, changes=[f"teacher.{option}"], backend="vllm", batching=None)
    with pytest.raises(DistillError, match=f"backend vllm does not use teacher.{option.partition('=')[0]}: remove it"):
        generate_data(recipe, str(tmp_path / "out"))
    assert not engines


def test_a_file_has_groups_of_rows_that_can_be_read_at_once(recipe_of, tmp_path, monkeypatch):
    """A group with more than 2 GiB of conversations can be written, and not be read."""
    monkeypatch.setattr("hf_distill.generation.store._ROWS_PER_GROUP", 2)
    generate_data(recipe_of(CONVERSATIONS), str(tmp_path / "out"))
    (file,) = (tmp_path / "out" / "data").iterdir()
    metadata = pq.ParquetFile(file).metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [2, 2, 1]
    assert [row["row"] for row in rows_of(tmp_path / "out")] == [*range(5)]


def test_a_folder_with_other_files_is_refused_before_the_teacher_is_loaded(recipe_of, tmp_path, without_teacher):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").touch()
    without_teacher()
    for resume in (False, True):
        with pytest.raises(DistillError, match="contains other files than a generated data set"):
            generate_data(recipe_of(TEXTS), str(tmp_path / "out"), resume=resume)


def test_other_filters_need_no_new_generation(recipe_of, tmp_path, monkeypatch):
    """The filter `function` raises for one row, which is set aside; `best_of_n` keeps one sample of each prompt."""
    texts = [{**row, "filter": "mine", "error": "none"} for row in TEXTS]
    (tmp_path / "judge_of_test.py").write_text("def judge(row):\n    return 1 / row['row'] > 0.3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    generate_data(recipe_of(texts, samples=2), str(tmp_path / "out"))
    everything = rows_of(tmp_path / "out")
    monkeypatch.setattr(local.TransformersBackend, "_padded", None)  # it must not generate
    steps = {"filters": [{"name": "function", "function": "judge_of_test:judge"}], "select": "best_of_n"}
    stages = []
    data = generate_data(recipe_of(texts, samples=2, **steps), str(tmp_path / "out"), True, stages.append)
    rows = rows_of(tmp_path / "out")
    best = [max((row for row in everything if row["row"] == i), key=lambda row: row["logprob"]) for i in (1, 2, 3)]
    assert [(row["row"], row["sample"]) for row in rows] == [(row["row"], row["sample"]) for row in best]
    assert (data.completions, data.rows) == (10, 3)
    aside = pq.read_table(tmp_path / "out" / "set_aside.parquet").to_pylist()
    assert [(row["row"], row["sample"]) for row in aside] == [(0, 0), (0, 1)]
    assert (aside[0]["filter"], aside[0]["error"]) == ("mine", "none")
    assert aside[0]["set_aside_by"] == "function judge_of_test:judge"
    assert "ZeroDivisionError" in aside[0]["set_aside_error"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert [line.split(" | ")[-4:] for line in card.splitlines() if line.startswith(("| function", "| best_of"))] == [
        ["10", "2", "2", "6 |"],
        ["6", "3", "0", "3 |"],
    ]
    assert any("removed 2 of 10, and 2 raised an exception (the first: ZeroDivisionError" in stage for stage in stages)
    generate_data(recipe_of(texts, samples=2), str(tmp_path / "out"), True)
    assert rows_of(tmp_path / "out") == everything
    assert not (tmp_path / "out" / "set_aside.parquet").exists()


def test_filters_that_leave_nothing_are_an_error_that_names_them_and_keep_the_completions(recipe_of, tmp_path):
    filters = [{"name": "length", "min_tokens": 100}]
    with pytest.raises(DistillError, match=r"length.*5"):
        generate_data(recipe_of(TEXTS, filters=filters), str(tmp_path / "out"))
    assert not (tmp_path / "out" / "data").exists()
    assert generate_data(recipe_of(TEXTS), str(tmp_path / "out"), resume=True).rows == 5


def test_a_filter_on_a_missing_column_is_an_error_before_the_generation(recipe_of, tmp_path):
    recipe = recipe_of(TEXTS, samples=2, log_probs=False, select="best_of_n")
    with pytest.raises(DistillError, match=r"best_of_n by logprob reads the column 'logprob'"):
        generate_data(recipe, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "generate", "message"),
    [
        ([{"text": "no prompt"}], {}, r"data.task has the columns \['text'\], and no prompts: use a source"),
        ([{"prompt": " "}], {}, "row 0 .counted from 0., column prompt: it is empty"),
        (
            [{"prompt": "a"}, {"prompt": None}],
            {},
            "row 1 .counted from 0., column prompt: found null, but it needs a text",
        ),
        (TEXTS, {"system_prompt": "x"}, "system_prompt needs conversations"),
        (
            TEXTS,
            {"max_new_tokens": 508},
            "5 of 5 prompts do not fit into the context of 512 .*, or use shorter prompts",
        ),
        ([*TEXTS, {"prompt": "long " * 110}], {}, "1 of 6 prompts do not fit.* data.task, row 5"),
        (TEXTS, {"backend": "server", "batching": None}, "needs a URL: pass generate.url="),
    ],
)
def test_invalid_prompts_leave_no_data_set(rows, generate, message, recipe_of, tmp_path):
    with pytest.raises(DistillError, match=message):
        generate_data(recipe_of(rows, **generate), str(tmp_path / "out"))
    assert not [path for path in (tmp_path / "out").glob("*") if not path.name.startswith(".")]


def test_prompts_that_are_too_long_can_be_dropped(recipe_of, tmp_path, caplog):
    rows = [{"prompt": "long " * 110}, *TEXTS]
    data = generate_data(recipe_of(rows, overflow="drop"), str(tmp_path / "out"))
    assert [row["row"] for row in rows_of(data.folder)] == [1, 2, 3, 4, 5]


def test_a_template_without_a_generation_prompt_is_refused(recipe_of, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    recipe = recipe_of(CONVERSATIONS, changes=[f"data.chat_template={template}"])
    with pytest.raises(DistillError, match=r"row 0 .* renders no generation prompt"):
        generate_data(recipe, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        ({"samples": 2, "temperature": 0}, "temperature 0 gives the same completion each time"),
        ({"backend": "server"}, "backend server does not use batching"),
        ({"backend": "server", "batching": None, "overflow": "drop"}, "backend server does not use overflow"),
        ({"url": "http://127.0.0.1:1"}, "backend transformers does not use url"),
        ({"select": "best_of_n"}, "select chooses among the samples of a prompt, and there is one"),
        ({"select": {"name": "best_of_n", "keep": 4}, "samples": 4}, "select keeps 4 of 4 samples"),
        ({"filters": ["lenght"]}, "length"),
        ({"stop": [""]}, "the texts must not be empty"),
        ({"backend": "server", "batching": None, "url": "http://u:p@host"}, "contains credentials"),
    ],
)
def test_contradictions_of_the_section_are_reported(generate, message, recipe_of):
    with pytest.raises(DistillError, match=message):
        recipe_of(TEXTS, **generate)


def test_the_command_writes_a_smoke_data_set(run_cli, recipe_of, tmp_path):
    resolve_model("smoke:llama/teacher")
    recipe_of(TEXTS, backend="server", url="http://127.0.0.1:1", batching=None, samples=2, cache="top_k", k=8)
    file, overrides = str(tmp_path / "data.yaml"), ["distill.alpha=0.25", "generate.seed=0"]
    result = run_cli("generate", file, *overrides, "-o", str(tmp_path / "out"), "--smoke")
    assert result.returncode == 0, result.stderr
    assert "16 completions" in result.stdout
    train = f"hf-distill run {file} distill.alpha=0.25 data.task.path={tmp_path / 'out'} --smoke"
    assert f"Train on the data: {train}\n" in result.stdout
    source = Source(path="x", column="question", generate=True)
    command = _training_command(
        "my.yaml", ["data.task.path=x", "data.task.column=q", "generate={seed: 1}"], "out", False, source
    )
    assert command == "hf-distill run my.yaml data.task.path=out data.task.column=null data.task.generate=false"
    assert len(rows_of(tmp_path / "out")) == 16
    assert Path(tmp_path / "out" / "README.md").is_file()
    assert f"teacher='{{kind: cached, path: {tmp_path / 'out' / 'cache'}}}'" in result.stdout
    assert (tmp_path / "out" / "cache" / "manifest.json").is_file()
