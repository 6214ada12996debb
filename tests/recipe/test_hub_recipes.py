"""Recipes on the Hub are loaded, pinned, listed and copied; inaccessible ones are reported."""

import os
import subprocess
import sys

import pytest
import yaml
from hub_server import Fault
from huggingface_hub import constants
from typer.testing import CliRunner

from hf_distill import DistillError
from hf_distill.cli import app
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.hub_recipes import list_remote, pull_recipe
from hf_distill.version import __version__

GOOD = """\
# Small into smaller.
extends: quickstart
train: {max_steps: 2}
"""
ADDRESS = "hf://org/recipes/small.yaml"


@pytest.fixture(autouse=True)
def somewhere(hub, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub.put("models", "org/recipes", {"small.yaml": GOOD.encode(), "README.md": b"# x"})


def refused(reference: str, *overrides: str) -> str:
    with pytest.raises(DistillError) as caught:
        load_recipe(reference, overrides)
    return str(caught.value)


def test_a_recipe_that_extends_another_overrides_its_values(hub):
    extended, packaged = load_recipe(ADDRESS), load_recipe("quickstart")
    assert extended.train.max_steps == 2
    assert extended.train.learning_rate == packaged.train.learning_rate
    assert extended.student == packaged.student


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_recipes_load_from_model_and_dataset_repositories_revisions_and_folders(hub, kind):
    old = hub.put(kind, "org/more", {"a/b/x.yaml": GOOD.encode()})
    hub.put(kind, "org/more", {"a/b/x.yaml": GOOD.replace("2}", "7}").encode()})
    prefix = "hf://datasets/" if kind == "datasets" else "hf://"
    assert load_recipe(f"{prefix}org/more/a/b/x.yaml").train.max_steps == 7
    then = load_recipe(f"{prefix}org/more@{old}/a/b/x.yaml")
    assert (then.train.max_steps, then.origin) == (2, f"{prefix}org/more@{old}/a/b/x.yaml")
    page = f"https://huggingface.co/{'datasets/' if kind == 'datasets' else ''}org/more/blob/{old}/a/b/x.yaml"
    assert load_recipe(page) == then


def test_a_cached_recipe_needs_no_network(hub, monkeypatch):
    first = load_recipe(ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert load_recipe(ADDRESS) == first
    assert not hub.requests


def test_a_run_records_the_commit_of_its_recipe(hub):
    commit = hub.repos["models", "org/recipes"].at("main")
    result = run_recipe(load_recipe(ADDRESS, ["control=null"], smoke=True))
    pinned = f"hf://org/recipes@{commit}/small.yaml"
    assert yaml.safe_load((result.folder / "recipe.yaml").read_text())["origin"] == pinned
    assert f'"origin": "{pinned}"' in (result.folder / "results.json").read_text()
    hub.put("models", "org/recipes", {"small.yaml": GOOD.encode() + b"# moved\n"})
    resumed = load_recipe(ADDRESS, ["control=null"], smoke=True)
    assert resumed.origin != pinned
    run_recipe(resumed, resume=True)  # an equal recipe at another commit is no other run


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("hf://org/recipe/small.yaml", "did you mean 'org/recipes'?"),
        ("hf://org/recipes/smal.yaml", "did you mean 'small.yaml'?"),
        ("hf://org/recipes@mian/small.yaml", "did you mean 'main'?"),
        ("hf://org/recipes", "is not the address of a .yaml file"),
        ("hf://recipes", "is not a valid Hub URI"),
        ("hf://spaces/org/x/y.yaml", "not a model or data set repository"),
        ("hf://org/recipes/../../x.yaml", "leads out of its repository"),
        ("https://example.org/x.yaml", "is not a valid Hub URI"),
    ],
)
def test_a_missing_reference_is_reported_with_similar_names(hub, reference, words):
    assert words in refused(reference)


def test_a_dataset_requested_as_a_model_is_suggested(hub):
    hub.put("datasets", "org/other", {"a.yaml": GOOD.encode()})
    assert "hf://datasets/org/other" in refused("hf://org/other/a.yaml")


def test_gated_private_and_unauthenticated_access_have_different_errors(hub, monkeypatch):
    hub.put("models", "org/gated", {"a.yaml": GOOD.encode()}, gated=True)
    assert "accept its terms at" in refused("hf://org/gated/a.yaml")
    hub.put("models", "org/private", {"a.yaml": GOOD.encode()}, private=True)
    assert load_recipe("hf://org/private/a.yaml")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused("hf://org/private@main/a.yaml".replace("private", "gone"))


def test_a_failing_hub_is_reported(hub):
    hub.faults.append(Fault(match=".*", status=500, times=999))
    assert "The Hub" in refused(ADDRESS)
    hub.faults[:] = [Fault(match=".*", cut=True, times=999)]
    assert "cannot be reached" in refused(ADDRESS)


def test_a_recipe_for_a_newer_version_is_refused_before_its_keys_are_validated(hub):
    hub.put("models", "org/recipes", {"new.yaml": b"requires: '>=99'\nfuture: {x: 1}\n"})
    message = refused("hf://org/recipes/new.yaml")
    assert __version__ in message
    assert "pip install --upgrade" in message
    assert "future" not in message


def test_large_files_are_not_downloaded(hub):
    hub.put("models", "org/recipes", {"big.yaml": b"# " + b"x" * 300_000})
    assert "at most" in refused("hf://org/recipes/big.yaml")
    assert ("GET", "/org/recipes/resolve/main/big.yaml") not in hub.requests


def test_list_remote_lists_recipes_and_omits_other_yaml_files(hub):
    hub.put(
        "models", "org/recipes", {"a.yaml": GOOD.encode(), "config.yaml": b"x: 1\n", "evil.yaml": b"student: !!x y"}
    )
    titles = {at.rpartition("/")[2]: title for at, title in list_remote("hf://org/recipes").items()}
    assert titles.keys() == {"a.yaml", "evil.yaml"}
    assert titles["a.yaml"] == "Small into smaller."
    assert titles["evil.yaml"].startswith("(refused:")
    hub.put("models", "org/none", {"README.md": b""})
    with pytest.raises(DistillError, match="no YAML files"):
        list_remote("hf://org/none")


def test_a_pulled_recipe_is_complete_validated_and_records_its_origin(hub, tmp_path):
    text = GOOD.replace("{max_steps: 2}", "{max_steps: 2, deepspeed: ds/zero.json}")
    files = {
        "r/x.yaml": text.encode(),
        "r/ds/zero.json": b'{"zero_optimization": {"stage": 2}}',
        "r/bad.yaml": b"a: !!x y",
    }
    commit = hub.put("models", "org/recipes", files)
    written = pull_recipe("hf://org/recipes/r/x.yaml", tmp_path / "mine")
    assert [str(path.relative_to(tmp_path / "mine")) for path in written] == ["x.yaml", "ds/zero.json"]
    assert written[0].read_text().endswith(f"# from hf://org/recipes@{commit}/r/x.yaml\n")
    assert load_recipe(str(written[0])).train.deepspeed == {"zero_optimization": {"stage": 2}}
    with pytest.raises(DistillError, match="--force"):
        pull_recipe("hf://org/recipes/r/x.yaml", tmp_path / "mine")
    with pytest.raises(DistillError):
        pull_recipe("hf://org/recipes/r/bad.yaml", tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "train",
    [
        {"lr_scheduler_kwargs": {"deepspeed": ".vscode/tasks.json"}},
        {"lr_scheduler_kwargs": {"a": [{"deepspeed": "ds/zero.json"}]}},
        {"optim_target_modules": [{"deepspeed": "Makefile"}]},
    ],
)
def test_only_typed_fields_name_files_that_are_pulled(hub, tmp_path, train):
    text = yaml.safe_dump({"extends": "quickstart", "train": {"max_steps": 2, **train}})
    files = {"x.yaml": text.encode(), ".vscode/tasks.json": b"{}", "ds/zero.json": b"{}", "Makefile": b"{}"}
    hub.put("models", "org/recipes", files)
    pull_recipe("hf://org/recipes/x.yaml", tmp_path / "mine")
    assert {path.name for path in (tmp_path / "mine").rglob("*")} == {"x.yaml"}


@pytest.mark.parametrize(
    "name", [".vscode/tasks.json", "a/.git/config.json", "run.sh", "a/.json", "/etc/x.json", "~/x.json"]
)
def test_hidden_and_executable_files_are_never_pulled(hub, tmp_path, name):
    text = yaml.safe_dump({"extends": "quickstart", "train": {"max_steps": 2, "deepspeed": name}})
    hub.put(
        "models", "org/recipes", {"x.yaml": text.encode(), name.lstrip("/"): b'{"zero_optimization": {"stage": 2}}'}
    )
    with pytest.raises(DistillError, match=r"hidden folder|leads out"):
        pull_recipe("hf://org/recipes/x.yaml", tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_a_recipe_with_a_hidden_name_is_not_pulled_and_a_config_is_written_as_it_was_checked(hub, tmp_path):
    config = b'{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}'
    text = GOOD.replace("{max_steps: 2}", "{max_steps: 2, deepspeed: package.json}")
    files = {
        ".pre-commit-config.yaml": GOOD.encode(),
        "x.yaml": text.encode() + b"# \xe2\x80\xae\n",
        "package.json": config,
    }
    hub.put("models", "org/recipes", files)
    with pytest.raises(DistillError, match="hidden files are never written"):
        pull_recipe("hf://org/recipes/.pre-commit-config.yaml", tmp_path / "mine")
    recipe, packaged = pull_recipe("hf://org/recipes/x.yaml", tmp_path / "mine")
    assert "\u202e" not in recipe.read_text()
    assert packaged.read_text() == '{\n  "zero_optimization": {\n    "stage": 2\n  }\n}\n'
    assert not packaged.stat().st_mode & 0o111


def test_run_lists_downloads_and_requires_confirmation_for_an_untrusted_recipe(hub):
    hub.put(
        "models",
        "org/teacher",
        {"model.safetensors": b"x" * 1500, "config.json": b"{}", "pytorch_model.bin": b"x" * 9000},
    )
    hub.put("models", "org/recipes", {"t.yaml": GOOD.encode() + b"teacher: {model: org/teacher}\n"})
    result = CliRunner().invoke(app, ["run", "hf://org/recipes/t.yaml"])
    assert "org/teacher" in result.output
    assert "1.5 kB" in result.output
    assert isinstance(result.exception, DistillError)
    assert "--yes" in str(result.exception)


@pytest.mark.parametrize(
    "command", [["inspect"], ["temperature"], ["recipes", "preview"], ["cache", "write", "-o", "here"]], ids=" ".join
)
def test_other_commands_that_load_models_require_confirmation(hub, command, tmp_path):
    result = CliRunner().invoke(app, [*command[:2], ADDRESS, *command[2:]] if len(command) > 1 else [*command, ADDRESS])
    assert "--yes" in str(result.exception)
    assert not (tmp_path / "here").exists()


def test_a_pulled_recipe_is_trusted_and_needs_no_confirmation(hub, tmp_path):
    (path,) = pull_recipe(ADDRESS, tmp_path / "mine")
    result = CliRunner().invoke(app, ["run", str(path), "train.output_dir=mine/run", "--smoke", "control=null"])
    assert result.exit_code == 0, result.exception


def test_loading_a_recipe_from_the_hub_imports_no_torch(hub, tmp_path):
    code = (
        "import sys; from hf_distill.recipe import load_recipe; load_recipe(sys.argv[1]); print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ADDRESS],
        env=os.environ | hub.environment(tmp_path / "home"),
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "False", done.stderr


def test_pickled_weights_of_an_untrusted_recipe_are_refused(hub):
    hub.put("models", "org/teacher", {"pytorch_model.bin": b"x", "config.json": b"{}"})
    hub.put("models", "org/recipes", {"t.yaml": GOOD.encode() + b"teacher: {model: org/teacher}\n"})
    result = CliRunner().invoke(app, ["run", "--yes", "hf://org/recipes/t.yaml"])
    assert "pickled" in str(result.exception)


def test_a_missing_model_is_reported_before_anything_is_loaded(hub, tmp_path):
    hub.put("models", "org/teacher", {"model.safetensors": b"x", "config.json": b"{}"})
    result = CliRunner().invoke(app, ["run", "quickstart", "teacher.model=org/teachr"])
    assert "did you mean 'org/teacher'?" in str(result.exception)
    assert not (tmp_path / "runs").exists()
