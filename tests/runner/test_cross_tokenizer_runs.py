"""Recipes whose teacher has another tokenizer: in this process, in a cache, on a server; also on-policy."""

import json
from pathlib import Path

import pytest
import yaml
from servers.teacher_servers import SGLangServer, VLLMServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.cache import open_cache
from hf_distill.cache.fingerprints import tokenizer_fingerprint
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.cache_writer import verify_against_teacher, write_recipe_cache
from hf_distill.runner.model_loading import resolve_model

TEACHER = "smoke:qwen2/other-tokenizer-teacher"
ON_POLICY = {"fraction": 0.5, "max_completion_length": 8}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def recipe_of(name: str, **changes):
    values = {
        "student": {"model": "smoke:llama/student"},
        "teacher": {"model": TEACHER},
        "data": {"task": {"path": "package:builtins"}, "eval": {"holdout": 0.1, "max_rows": 4}, "max_length": 96},
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
