"""Recipes whose teacher has another tokenizer: in this process, in a cache, on a server; also on-policy."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from servers.teacher_servers import SGLangServer, VLLMServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.analysis import ModelPair, open_run
from hf_distill.analysis.evaluation import retention_of
from hf_distill.analysis.run_models import RunModels, prompt_length
from hf_distill.cache import open_cache
from hf_distill.cache.fingerprints import tokenizer_fingerprint
from hf_distill.data import load_examples
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.cache_writer import verify_against_teacher, write_recipe_cache
from hf_distill.runner.model_loading import resolve_model

TEACHER = "smoke:qwen2/other-tokenizer-teacher"
ON_POLICY = {"fraction": 0.5, "max_completion_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    rows = load_examples("package:builtins").select(range(48))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def recipe_of(name: str, **changes):
    values = {
        "student": {"model": "smoke:llama/student"},
        "teacher": {"model": TEACHER},
        "data": {"task": {"path": "texts.jsonl"}, "eval": {"holdout": 0.1, "max_rows": 4}, "max_length": 96},
        "distill": {"cross_tokenizer": "alm", "alpha": 0.9},
        "train": {"output_dir": f"runs/{name}", "max_steps": 3, "logging_steps": 1, "use_cpu": True}
        | {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "save_strategy": "no"},
    } | changes
    with open(f"{name}.yaml", "w") as file:
        yaml.safe_dump(json.loads(json.dumps(values)), file)
    return load_recipe(f"{name}.yaml")


def losses_of(name: str, **changes) -> list[float]:
    """The losses of the training of a recipe."""
    result = run_recipe(recipe_of(name, **changes))
    logs = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert result.models["student"]["bits_per_byte"] > 0
    return [log["soft_loss"] for log in logs if "soft_loss" in log]


@pytest.fixture(scope="module")
def frozen(folder):
    """The losses with the teacher in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return losses_of("frozen")


@pytest.fixture(scope="module", params=[VLLMServer, SGLangServer])
def server(request):
    path = resolve_model(TEACHER)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    with request.param(model, name="org/teacher", tokenizer=tokenizer, context=512) as server:
        server.api = "vllm" if request.param is VLLMServer else "sglang"
        yield server


def remote(server, **options) -> dict:
    return {"kind": "remote", "url": server.url, "api": server.api, "top_k": 4, "tokenizer": TEACHER} | options


def test_the_loss_falls_and_most_tokens_are_compared(frozen):
    logs = [json.loads(line) for line in Path("runs/frozen/metrics.jsonl").read_text().splitlines()]
    assert all(log["aligned_tokens"] > 0.9 for log in logs if "soft_loss" in log)
    assert any(log["tokens_per_chunk"] > 1 for log in logs if "soft_loss" in log)
    assert all(loss > 0 for loss in frozen)
    results = json.loads(Path("runs/frozen/results.json").read_text())
    assert results["teacher"]["parameters"] > results["student"]["parameters"]


def test_a_server_gives_the_losses_of_the_teacher_in_this_process(frozen, server):
    """alm reads the log-probabilities of the text only, which a server returns of any token."""
    assert losses_of(server.api, teacher=remote(server)) == pytest.approx(frozen, rel=1e-4)


@pytest.mark.parametrize(("kind", "tolerance"), [("hidden", 1e-4), ("top_k", 0.02)])
def test_a_cache_gives_the_losses_of_the_teacher_that_wrote_it(frozen, kind, tolerance):
    path, manifest = write_recipe_cache(recipe_of("frozen"), f"caches/{kind}", kind=kind, **_options(kind))
    assert manifest.tokenizer == tokenizer_fingerprint(AutoTokenizer.from_pretrained(resolve_model(TEACHER)))
    cached = {"kind": "cached", "path": str(path), "tokenizer": TEACHER}
    assert losses_of(f"cached-{kind}", teacher=cached) == pytest.approx(frozen, rel=tolerance)
    assert verify_against_teacher(open_cache(str(path)), 8)["identical"] == 1


def _options(kind: str) -> dict:
    return {"dtype": "float32"} if kind == "hidden" else {"k": 4}


def test_caches_that_alm_cannot_read_are_refused():
    with pytest.raises(DistillError, match="do not support a sampled cache: use --kind hidden or top_k"):
        write_recipe_cache(recipe_of("frozen"), "caches/sampled", kind="sampled")
    path, _ = write_recipe_cache(recipe_of("frozen"), "caches/plain", kind="top_k", k=4, labels=False)
    cached = {"kind": "cached", "path": str(path), "tokenizer": TEACHER}
    with pytest.raises(
        DistillError, match="needs the log-probabilities of the text, and the cache has those of the mo"
    ):
        run_recipe(recipe_of("plain", teacher=cached))


def test_a_cache_is_written_from_a_server(frozen, server):
    name = f"served-{server.api}"
    path, manifest = write_recipe_cache(recipe_of(name, teacher=remote(server)), f"caches/{name}", kind="top_k", k=4)
    assert manifest.options == {"k": 4, "labels": True}
    cached = {"kind": "cached", "path": str(path), "tokenizer": TEACHER}
    assert losses_of(f"cached-{name}", teacher=cached) == pytest.approx(frozen, rel=0.02)


def test_completions_of_the_student_become_rows_of_the_teacher(server):
    """Half of the rows are completed by the student; the teacher is in this process or on a server."""
    options = {"on_policy": ON_POLICY, "distill": {"cross_tokenizer": "alm", "alpha": 0.9}}
    local = losses_of(f"on-policy-{server.api}", **options)
    assert losses_of(f"on-policy-served-{server.api}", teacher=remote(server), **options) == pytest.approx(
        local, rel=1e-3
    )
    assert all(loss > 0 for loss in local)


def test_several_teachers_read_rows_of_their_own(frozen):
    teachers = [{"name": "one", "model": TEACHER}, {"name": "two", "model": "smoke:llama/teacher"}]
    assert all(loss > 0 for loss in losses_of("several", teacher=None, teachers=teachers))


CHOICE = """
task: colors
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: choices
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def tasks(tmp_path) -> Path:
    """A folder with a task whose answers are long enough that the tokenizers divide them differently."""
    choices = ["a very bright and unmistakable red", "something between blue and green, 12345"]
    cases = [{"question": f"The color of number {i} is", "choices": choices, "gold": i % 2} for i in range(6)]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in cases))
    (tmp_path / "colors.yaml").write_text(CHOICE.format(data=tmp_path / "cases.jsonl"))
    return tmp_path


def naive_scores(reference: str, tasks: Path) -> list[float]:
    """1 for each question whose correct choice is the likeliest for a model, which reads its own tokens."""
    path = resolve_model(reference)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    values = []
    for case in map(json.loads, (tasks / "cases.jsonl").read_text().splitlines()):
        before, log_probs = tokenizer(case["question"])["input_ids"], []
        for choice in case["choices"]:
            ids = before + tokenizer(" " + choice)["input_ids"]
            log_p = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            log_probs.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(before), len(ids))))
        values.append(float(log_probs.index(max(log_probs)) == case["gold"]))
    return values


def test_retention_scores_each_model_with_its_own_tokenizer(frozen, tasks):
    retention_of(open_run("runs/frozen"), folder=tasks)
    values = json.loads(Path("runs/frozen/retention.json").read_text())["values"]
    expected = {"teacher": TEACHER, "before": "smoke:llama/student", "student": "runs/frozen/student"}
    assert values == {name: {"colors": naive_scores(model, tasks)} for name, model in expected.items()}


def test_samples_of_each_model_are_generated_in_its_own_tokens(frozen, run_cli):
    printed = run_cli("report", "runs/frozen", "--samples", "2", "--new-tokens", "6").stdout
    samples = json.loads(Path("runs/frozen/samples.json").read_text())["samples"]
    path = resolve_model(TEACHER)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    for sample in samples:
        assert set(sample["written"]) == {"teacher", "before", "student"}
        ids = tokenizer(sample["prompt"], return_tensors="pt")["input_ids"]
        output = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        assert sample["written"]["teacher"] == tokenizer.decode(output, skip_special_tokens=True)
    assert "Not in the report: a diagnosis of the run; it is for models of one tokenizer" in printed
    assert "generated samples" not in printed


def test_analyses_of_ids_refuse_a_teacher_with_another_tokenizer(frozen):
    run = open_run("runs/frozen")
    with pytest.raises(DistillError, match="compares distributions over the ids of one tokenizer"):
        ModelPair.of_run(run)
    with pytest.raises(DistillError, match="compares distributions over the ids of one tokenizer"):
        next(ModelPair.of_run(run, one_tokenizer=False).batches())


def test_samples_of_conversations_have_the_chat_template_of_each_model(frozen, tmp_path):
    chat = {"messages": [{"role": "user", "content": "Say 1"}, {"role": "assistant", "content": "It is 12345"}]}
    (tmp_path / "chats.jsonl").write_text((json.dumps(chat) + "\n") * 8)
    of_teacher = AutoTokenizer.from_pretrained(resolve_model(TEACHER))
    for before in ("{{ message.role", "assistant: {% endif"):
        of_teacher.chat_template = of_teacher.chat_template.replace(before, f"# {before}")
    of_teacher.save_pretrained(tmp_path / "tokenizer")
    data = {"task": {"path": str(tmp_path / "chats.jsonl")}, "eval": {"holdout": 0.25}, "max_length": 96}
    teacher = {"model": TEACHER, "tokenizer": str(tmp_path / "tokenizer")}
    run_recipe(recipe_of("chats", data=data, teacher=teacher))
    models = RunModels.of_run(open_run("runs/chats"))
    row = models.pair.rows[0]
    length = prompt_length(row, 32)
    for name in ("teacher", "student"):
        tokenizer = models.tokenizer(name)
        expected = tokenizer.apply_chat_template(chat["messages"][:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(models.prompt_ids(name, row, length)) == expected
    assert len({models.tokenizer(name).chat_template for name in ("teacher", "student")}) == 2


def test_a_report_without_a_model_of_the_teacher_has_no_samples(frozen, server, run_cli):
    losses_of(f"report-{server.api}", teacher=remote(server))
    result = run_cli("report", f"runs/report-{server.api}")
    assert result.returncode == 0
    assert "Not in the report: generated samples; The teacher of runs" in result.stdout
    with pytest.raises(DistillError, match="is of kind remote, which saves no model"):
        retention_of(open_run(f"runs/report-{server.api}"), ["mini_hellaswag"])
