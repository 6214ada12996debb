"""Untrusted recipes: values that are not allowed are refused before anything is fetched, run or written."""

import os
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from hub_server import Hub
from transformers import TrainingArguments

from hf_distill import DistillError
from hf_distill.recipe import list_recipes, load_recipe
from hf_distill.recipe.hub_policy import ALLOWED, KNOWN, REFUSED, policy_violations
from hf_distill.trainer.config import RUNTIME_FIELDS

GOOD = """\
# An untrusted recipe.
student: {model: org/student}
teacher: {model: org/teacher}
data: {task: {path: org/data}, eval: {holdout: 0.1}}
train: {output_dir: runs/x, learning_rate: 1e-4}
"""


@pytest.fixture(autouse=True)
def somewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)


def put(hub: Hub, text: str, **other_files: str) -> str:
    """Put a recipe and other files into a new repository; return the address of the recipe."""
    files = {"a/recipe.yaml": text} | {name.replace("__", "/"): content for name, content in other_files.items()}
    hub.put("models", "stranger/recipes", {name: content.encode() for name, content in files.items()})
    return "hf://stranger/recipes/a/recipe.yaml"


def changed(**parts) -> str:
    """Return the good recipe with other values at dotted keys, with `__` for the dot."""
    values = yaml.safe_load(GOOD)
    for dotted_key, value in parts.items():
        *parents, last = dotted_key.split("__")
        inner = values
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = value
    return yaml.safe_dump(values)


def bomb() -> str:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    return "\n".join(levels)


HOSTILE = {
    "runs a constructor": ("student: !!python/object/apply:os.system ['touch pwned']", "python/object/apply"),
    "imports a module": ("student: !!python/module:antigravity", "python/module"),
    "hides a path in binary": (GOOD.replace("org/student", "!!binary L2V0Yy9wYXNzd2Q="), "'binary'"),
    "is an alias bomb": (bomb(), "after its aliases are expanded"),
    "contains itself": ("a: &a [*a]", "a value which contains the alias"),
    "is nested without end": ("[" * 5000, "levels deep"),
    "is too large": ("# " + "x" * 300_000, "at most"),
    "gives a key twice": (GOOD + "train: {output_dir: /etc}\n", "twice"),
    "trusts remote code": (changed(student__trust_remote_code=True), "not allowed in a recipe"),
    "loads a local model": (changed(teacher__model="/etc/secret"), "is not an id on the Hub"),
    "climbs to a local model": (changed(teacher__model="../../secret"), "is not an id on the Hub"),
    "names a folder that is here": (changed(teacher__model="here"), "a path on this machine"),
    "imports a package to find a model": (changed(teacher__model="package:os.path/x.gguf"), "installed package"),
    "climbs out of a package": (changed(teacher__model="package:yaml/../x.gguf"), "installed package"),
    "runs a kernel of the Hub": (changed(teacher__attn_implementation="evil/kernel"), "downloaded and run"),
    "matches a pattern in unlimited time": (changed(student__lora={"target_modules": "(a+)+$"}), "unlimited time"),
    "reads a local file": (changed(data__task={"path": "/etc/hosts.txt"}), "leads out of the repository"),
    "climbs out of its repository": (changed(data__task={"path": "../../../x.jsonl"}), "leads out of the repository"),
    "reads the home": (changed(data__task={"path": "~/secret.jsonl"}), "leads out of the repository"),
    "reads a local folder": (changed(data__task={"path": "/home"}), "a path on this machine"),
    "reads the internet": (changed(data__task={"path": "https://evil.example/x"}), "is not an id on the Hub"),
    "reads a bucket": (changed(data__task={"path": "hf://spaces/evil/x"}), "is not the address"),
    "evaluates a local file": (changed(data__eval={"path": "/etc/x.csv"}), "leads out of the repository"),
    "writes elsewhere": (changed(train__output_dir="/tmp/x"), "not inside runs/"),
    "reads a template": (changed(data__chat_template="/etc/x.jinja"), "is a file on this machine"),
    "climbs to write": (changed(train__output_dir="runs/../.git"), "not inside runs/"),
    "writes to a hidden folder": (changed(train__output_dir="runs/.ssh"), "not inside runs/"),
    "pushes to an account": (
        changed(train__push_to_hub=True, train__hub_model_id="evil/x"),
        "not allowed in a recipe from the Hub",
    ),
    "brings a token": (changed(train__hub_token="hf_x"), "must not contain a token"),
    "logs into an account": (changed(train__report_to="wandb"), "your accounts"),
    "logs into all accounts": (changed(train__report_to="all"), "your accounts"),
    "reads a pickled checkpoint": (
        changed(train__resume_from_checkpoint="/tmp/x"),
        "not allowed in a recipe from the Hub",
    ),
    "compiles by another backend": (
        changed(train__torch_compile_backend="evil"),
        "not allowed in a recipe from the Hub",
    ),
    "reads a config of the machine": (changed(train__fsdp_config="/etc/x.json"), "a file on this machine"),
    "starts a thousand processes": (changed(train__dataloader_num_workers=1000), "at most 64"),
    "reads DeepSpeed of the machine": (changed(train__deepspeed="/etc/ds.json"), "leads out of the repository"),
    "reads DeepSpeed from a hidden folder": (changed(train__deepspeed=".vscode/tasks.json"), "not in a hidden folder"),
    "reads DeepSpeed from a script": (changed(teacher__deepspeed="ds/run.sh"), "give the path of a .json file"),
    "offloads to a disk": (
        changed(teacher__deepspeed={"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}),
        "offloading to disk",
    ),
    "lets DeepSpeed write": (
        changed(train__deepspeed={"flops_profiler": {"enabled": True, "output_file": "/tmp/x"}}),
        "keys that name a path",
    ),
    "reads a local cache": (changed(teacher={"kind": "cached", "path": "/srv/cache"}), "a path on this machine"),
    "extends a file": ("extends: ../../secret.yaml\n" + GOOD, "no packaged recipe"),
    "hides a stage": (
        changed(
            stages=[
                {"student": {"model": "org/a"}, "train": {"hub_revision": "x"}},
                {"student": {"model": "org/student"}},
            ]
        ),
        "stages.1.train.hub_revision",
    ),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_an_untrusted_recipe_is_refused_if_it(hub, tmp_path, what):
    """The message names what is wrong; nothing is executed, written, or read from this machine."""
    text, why = HOSTILE[what]
    (tmp_path / "here").mkdir()
    before = {path for path in tmp_path.rglob("*") if "hf" not in path.parts}
    with pytest.raises(DistillError) as caught:
        load_recipe(put(hub, text))
    assert why in str(caught.value)
    assert {path for path in tmp_path.rglob("*") if "hf" not in path.parts} == before
    requested = {path for _, path in hub.requests}
    assert all("stranger/recipes" in path for path in requested), requested


def test_at_least_25_hostile_recipes_are_tried():
    assert len(HOSTILE) >= 25


def test_an_allowed_recipe_is_loaded_at_its_commit(hub):
    at = put(hub, GOOD)
    recipe = load_recipe(at)
    commit = hub.repos["models", "stranger/recipes"].at("main")
    assert recipe.origin == f"hf://stranger/recipes@{commit}/a/recipe.yaml"
    assert load_recipe(at, ["train.output_dir=/tmp/mine", "train.report_to=wandb"]).train.output_dir == "/tmp/mine"


def test_an_origin_cannot_be_forged(hub):
    assert "forged" not in str(load_recipe(put(hub, GOOD + "origin: hf://forged/x/a.yaml\n")).origin)


def test_a_local_recipe_is_not_restricted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("local.yaml").write_text(changed(teacher__model="/srv/model", train__output_dir="/srv/run"))
    assert load_recipe("local.yaml").teacher.model == "/srv/model"


@pytest.mark.parametrize("name", list_recipes())
def test_packaged_recipes_comply_with_the_policy_for_the_hub(name):
    violations = policy_violations(load_recipe(name))
    assert [line.partition(":")[0] for line in violations] == (["teacher.url"] if name == "remote" else [])


REMOTE = {"kind": "remote", "model": "org/teacher"}


def test_a_recipe_from_the_hub_may_not_name_a_server_or_the_variable_of_a_key(hub):
    options = {"url": "http://collector.example", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
    with pytest.raises(DistillError) as error:
        load_recipe(put(hub, changed(teacher={**REMOTE, **options}, distill={"temperature": 1.0})))
    for name in options:
        assert f"teacher.{name}: an untrusted recipe may not name a server" in str(error.value)


def test_the_server_of_a_recipe_from_the_hub_is_named_on_the_command_line(hub):
    at = put(hub, changed(teacher=REMOTE, distill={"temperature": 1.0}))
    assert load_recipe(at, ["teacher.url=http://127.0.0.1:8000"]).teacher.url == "http://127.0.0.1:8000"
    with pytest.raises(DistillError, match=r"pass teacher.url=... on the command line"):
        load_recipe(at)
    two = [{"name": "a", "model": "org/teacher"}, {"name": "b", **REMOTE}]
    at = put(hub, changed(teacher=None, teachers=two, distill={"temperature": 1.0}))
    assert load_recipe(at, ["teachers.b.url=http://127.0.0.1:8000"]).teachers[1].url == "http://127.0.0.1:8000"


def test_each_training_argument_is_allowed_inspected_or_refused():
    """A field of a newer transformers is refused until it is added to a list, and this test fails."""
    fields_of_transformers = {field.name for field in fields(TrainingArguments) if field.init}
    assert fields_of_transformers | {*RUNTIME_FIELDS, "early_stopping_patience"} == KNOWN
    assert not ALLOWED & REFUSED


def test_relative_paths_refer_to_files_at_the_commit_of_the_recipe(hub):
    zero = '{"zero_optimization": {"stage": 3}}'
    text = changed(teacher__deepspeed="../ds/t.json", data__task={"path": "rows.jsonl"}, data__eval={"holdout": 0.1})
    at = put(hub, text, ds__t_json="x", **{"ds__t.json": zero, "a__rows.jsonl": '{"text": "a"}\n'})
    recipe = load_recipe(at)
    commit = hub.repos["models", "stranger/recipes"].at("main")
    assert recipe.teacher.deepspeed == {"zero_optimization": {"stage": 3}}
    assert recipe.data.task.path == f"hf://stranger/recipes@{commit}/a/rows.jsonl"
    hub.put("models", "stranger/recipes", {"a/recipe.yaml": text.encode()})  # another commit, without them
    assert load_recipe(f"hf://stranger/recipes@{commit}/a/recipe.yaml").teacher.deepspeed == recipe.teacher.deepspeed
    with pytest.raises(DistillError, match=r"has no file 'ds/t.json'"):
        load_recipe(at)


def test_templates_in_values_are_not_rendered(hub):
    recipe = load_recipe(put(hub, changed(train__run_name="{{ cycler.__init__.__globals__.os.system('touch x') }}")))
    assert recipe.train.run_name.startswith("{{")
    assert not os.path.exists("x")


def test_all_violations_are_reported_at_once(hub):
    text = textwrap.dedent("""\
        student: {model: /a}
        teacher: {model: /b}
        data: {task: {path: /c}, eval: {holdout: 0.1}}
        train: {output_dir: /d, hub_model_id: e/f}
        """)
    with pytest.raises(DistillError) as caught:
        load_recipe(put(hub, text))
    assert len(str(caught.value).splitlines()) == 6
