"""Recipes whose teacher is on a server."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from servers.hidden_server import HiddenServer
from servers.teacher_servers import VLLMServer
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.cache import open_cache
from hf_distill.errors import RunError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.cache_writer import verify_against_teacher, write_recipe_cache
from hf_distill.runner.model_loading import resolve_model

KEY = "sk-very-secret"


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = resolve_model("smoke:llama/teacher")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with VLLMServer(model, name="org/big-teacher", tokenizer=tokenizer, context=512, key=KEY) as server:
        monkeypatch.setenv("TEACHER_KEY", KEY)
        yield server


def recipe_of(server, **changes):
    values = {
        "student": {"model": "smoke:llama/student"},
        "teacher": {
            **{
                "kind": "remote",
                "url": server.url,
                "top_k": 8,
                "api_key_env": "TEACHER_KEY",
                "retry_seconds": 0.2,
                "prefetch": 0,
            },
        },
        "data": {"task": {"path": "package:builtins"}, "eval": {"holdout": 0.1, "max_rows": 4}, "max_length": 64},
        "distill": {"temperature": 1.0, "alpha": 0.5},
        "train": {"output_dir": "runs/remote", "max_steps": 4, "save_steps": 4, "logging_steps": 1, "use_cpu": True}
        | {"per_device_train_batch_size": 2},
    }
    values = json.loads(json.dumps(values))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        values[section] = values[section] | {name: value} if name else value
    with open("remote.yaml", "w") as file:
        yaml.safe_dump(values, file)
    return load_recipe("remote.yaml")


def test_a_run_records_what_answered_and_resumes_after_the_server_failed(server, tmp_path):
    answer, counted = server.answer, []

    def failing(path, body):
        if path == "/v1/completions" and len(body["prompt"]) > 4 and body["prompt_logprobs"] == 8:
            counted.append(path)
            if len(counted) > 4 + 2 * 2:  # the evaluation before training, and two steps of two rows
                raise ConnectionResetError
        return answer(path, body)

    server.answer = failing
    with pytest.raises(RunError, match="checkpoint-2 is complete"):
        run_recipe(recipe_of(server))
    server.answer = answer
    moved = server.url.replace("127.0.0.1", "localhost")  # another URL of the same model does not prevent resuming
    result = run_recipe(recipe_of(server, teacher__url=moved), resume=True)
    facts = json.loads((result.folder / "results.json").read_text())["servers"]
    assert facts == {
        "teacher": {"model": "org/big-teacher", "hosts": [f"localhost:{server.port}"], "api": "vllm", "top_k": 8}
    }
    logs = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert all("teacher_wait_seconds" in log for log in logs if "loss" in log)
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert not [file for file in written if KEY.encode() in file.read_bytes()]


def test_a_card_names_the_served_model_and_its_host(server):
    from hf_distill.publishing.card_data import _recipe, teacher_cards

    recipe = recipe_of(server, teacher__model="org/big-teacher")
    results = {"servers": {"teacher": {"model": "/srv/big", "hosts": ["h:1"], "api": "vllm", "top_k": 8}}}
    card = teacher_cards(recipe, results, lambda name, revision: None)["teacher"]
    assert card["hosts"] == ["h:1"]
    assert "/srv" not in str(card["model"])
    published = _recipe(SimpleNamespace(recipe=recipe, folder=Path("runs/remote")))
    assert published["teacher"]["model"] == "org/big-teacher"
    assert not {"url", "api_key_env"} & published["teacher"].keys()


def test_a_published_recipe_names_no_server():
    from hf_distill.core.server_urls import without_servers

    remote = {"kind": "remote", "url": ["http://10.0.0.5:8000/secret"], "api_key_env": "TEACHER_KEY", "top_k": 8}
    recipe = {"student": {"model": "org/student"}, "teacher": remote, "teachers": [remote | {"name": "maths"}]}
    public = {"kind": "remote", "top_k": 8}
    assert without_servers(recipe) == recipe | {"teacher": public, "teachers": [public | {"name": "maths"}]}
    assert without_servers({"student": recipe["student"]}) == {"student": recipe["student"]}


def test_a_url_without_a_comparison_with_the_teacher_is_refused(run_cli, tmp_path):
    done = run_cli("cache", "verify", str(tmp_path), "--teacher-url", "http://127.0.0.1:9")
    assert done.returncode == 2
    assert "--teacher-url needs --against-teacher" in done.stderr


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"teacher__url": None}, "kind remote needs the URL of a server"),
        ({"teacher__url": f"http://me:{KEY}@host"}, "contains credentials"),
        ({"teacher__url": ["http://a", "http://a/v1"]}, "must differ"),
        ({"teacher__url": "host:1"}, "http://"),
        ({"teacher__api": "tgi"}, "teacher.api"),
        ({"teacher__top_k": 0}, "teacher.top_k"),
        ({"teacher__dtype": "float16"}, "dtype is for api hidden"),
        ({"teacher__api": "hidden"}, "top_k and vocab_size have no effect with api hidden"),
        ({"teacher__vocab_size": 4}, "lower top_k"),
        ({"distill__temperature": 2.0}, "distill.temperature 2.0: set it to 1"),
        ({"student": {"from_teacher": {"keep_layers": 2}}}, "set student.model"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_loaded(server, changes, text):
    with pytest.raises(DistillError) as error:
        recipe_of(server, **changes)
    assert text in str(error.value)
    assert KEY not in str(error.value)
    assert not server.requests


def test_a_remote_teacher_is_planned_without_its_memory(server):
    from hf_distill.planning import plan

    planned = plan(recipe_of(server), gpus=1, gpu_memory=24)
    assert {row.strategy.teacher for row in planned.rows} == {"remote"}
    assert "as many tokens per second" in planned.advice
    assert "smoke:llama/student" not in planned.teacher.name
    assert "of unknown size" in planned.teacher.name
    assert planned.rows[0].parts.teacher == 0


def test_the_output_head_that_a_server_sends_is_planned_on_the_gpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    from transformers import AutoConfig

    from hf_distill.planning import plan

    server = SimpleNamespace(url="http://10.0.0.5:9000")
    teacher = {"kind": "remote", "api": "hidden", "url": server.url, "model": "Qwen/Qwen2.5-72B-Instruct"}
    planned = plan(recipe_of(server, teacher=teacher), gpus=1, gpu_memory=80)
    assert planned.teacher.name == "Qwen/Qwen2.5-72B-Instruct on a server"
    assert planned.teacher.parameters == pytest.approx(72.7e9, rel=0.01)
    assert planned.rows[0].parts.teacher == 152_064 * 8192 * 2
    unnamed = plan(recipe_of(server, teacher=teacher | {"model": "big"}), gpus=1, gpu_memory=80)
    assert unnamed.teacher.name == "big on a server, of unknown size, taken to be as large as the student"
    student = AutoConfig.from_pretrained(resolve_model("smoke:llama/student"))
    assert unnamed.rows[0].parts.teacher == student.vocab_size * student.hidden_size * 4


def test_a_cache_is_written_from_a_server_and_gives_the_same_losses(server):
    options = {"kind": "top_k", "k": 8, "batch_size": 4, "shard_rows": 16}
    lines = [json.dumps({"text": f"The number {i} times {i} is {i * i}."}) for i in range(24)]
    Path("texts.jsonl").write_text("\n".join(lines))
    rows = {"data__task": {"path": "texts.jsonl"}}
    folder, manifest = write_recipe_cache(recipe_of(server, **rows), "cache", **options)
    assert manifest.teacher["served"]["model"] == "org/big-teacher"
    text = (folder / "manifest.json").read_text()
    assert KEY not in text
    assert "http://" not in text
    assert "TEACHER_KEY" not in text
    with pytest.raises(DistillError, match="pass its URL"):
        verify_against_teacher(open_cache(str(folder)), 8)
    servers = {"url": [server.url], "api_key_env": "TEACHER_KEY"}
    assert verify_against_teacher(open_cache(str(folder)), 8, **servers)["identical"] == 1.0
    before = len(server.requests)
    cached = run_recipe(recipe_of(server, **rows, teacher={"kind": "cached", "path": "cache"}))
    assert len(server.requests) == before
    served = run_recipe(recipe_of(server, **rows, train__output_dir="runs/served"))
    logs = [
        [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
        for run in (cached, served)
    ]
    losses = [[log["soft_loss"] for log in each if "soft_loss" in log] for each in logs]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], abs=0.01)  # half a step of the grid of stored log-probabilities


def test_a_server_of_log_probabilities_cannot_fill_a_cache_of_hidden_states(server):
    with pytest.raises(DistillError, match="use --kind top_k"):
        write_recipe_cache(recipe_of(server), "cache", kind="hidden")
    assert not server.requests


@pytest.fixture
def hidden_server(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    path = resolve_model("smoke:llama/teacher")
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path)
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with HiddenServer(model, tmp_path / "server", name="org/big-teacher", tokenizer=tokenizer, key=KEY) as server:
        yield server


def test_hidden_states_of_a_server_train_as_the_local_teacher_and_fill_a_hidden_cache(hidden_server, tmp_path):
    losses = [{"name": "forward_kl"}, {"name": "hidden_mse", "weight": 0.1, "layers": "stretch"}]
    options = {"distill__temperature": 2.0, "train__max_steps": 2, "losses": losses}
    teacher = {"kind": "remote", "api": "hidden", "url": hidden_server.url, "api_key_env": "TEACHER_KEY"}
    by_server, local = options | {"teacher": teacher}, options | {"teacher": {"model": "smoke:llama/teacher"}}
    served = run_recipe(recipe_of(hidden_server, **by_server))
    reference = run_recipe(recipe_of(hidden_server, **local, train__output_dir="runs/local"))
    results, expected = (json.loads((run.folder / "results.json").read_text()) for run in (served, reference))
    assert results["models"]["student"]["kl"] == pytest.approx(expected["models"]["student"]["kl"], rel=1e-5)
    facts = {"model": "org/big-teacher", "hosts": [f"127.0.0.1:{hidden_server.port}"], "api": "hidden"}
    facts |= {"dtype": "float32", "weights": hidden_server.teacher.info.weights}
    assert results["servers"]["teacher"] == facts

    folder, manifest = write_recipe_cache(recipe_of(hidden_server, **by_server), "a", kind="hidden", dtype="float32")
    _, of_local = write_recipe_cache(recipe_of(hidden_server, **local), "b", kind="hidden", dtype="float32")
    assert manifest.teacher["served"] == facts
    assert manifest.teacher["weights"] == of_local.teacher["weights"]
    assert (manifest.head["sha256"], manifest.width) == (of_local.head["sha256"], of_local.width)
    assert (manifest.options, manifest.depth) == (of_local.options, of_local.depth)
    assert manifest.options["layers"]
    servers = {"url": [hidden_server.url], "api_key_env": "TEACHER_KEY"}
    assert verify_against_teacher(open_cache(str(folder)), 8, **servers)["examples"] >= 8
    with pytest.raises(DistillError, match="is not on a server"):
        verify_against_teacher(open_cache("b"), 8, **servers)
    cached = run_recipe(
        recipe_of(hidden_server, **options, teacher={"kind": "cached", "path": "a"}, train__output_dir="runs/cached")
    )
    loss = json.loads((cached.folder / "results.json").read_text())["models"]["student"]["kl"]
    assert loss == pytest.approx(results["models"]["student"]["kl"], rel=1e-4)
