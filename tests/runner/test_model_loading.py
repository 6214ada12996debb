"""The load policy: safetensors are always allowed, pickles and Python code only if the user allows them."""

import json
import shutil

import pytest
import torch
import yaml
from tiny import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.model_loading import (
    LoadPolicy,
    load_policy,
    load_pretrained,
    model_without_weights,
    resolve_model,
)

CODE = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\nopen({!r}, 'w')\n"


@pytest.fixture
def pickled(tmp_path):
    """A model whose weights are a pickle."""
    model = build("llama", 0)
    model.config.save_pretrained(tmp_path / "m")
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    return str(tmp_path / "m")


def test_pickled_weights_are_loaded_only_if_the_policy_allows_it(pickled):
    with pytest.raises(DistillError, match="--allow-pickles"):
        load_pretrained(AutoModelForCausalLM, pickled)
    with load_policy(LoadPolicy(pickles=True)):
        assert load_pretrained(AutoModelForCausalLM, pickled)
    with pytest.raises(DistillError, match="--allow-pickles"):
        load_pretrained(AutoModelForCausalLM, pickled)


def test_the_policy_applies_to_a_teacher_that_is_loaded_later(pickled, tmp_path):
    byte_tokenizer().save_pretrained(pickled)
    options = [f"teacher.model={pickled}", f"train.output_dir={tmp_path / 'run'}", "control=null", "data.max_length=32"]
    values = ["teacher.device_map=cpu", "student.model=smoke:llama/student", "student.from_teacher=null"]
    with pytest.raises(DistillError, match="cannot be loaded"):
        run_recipe(load_recipe("quickstart", [*options, *values]))


def test_code_of_a_model_runs_only_if_the_policy_allows_it(tmp_path):
    folder, ran = tmp_path / "m", tmp_path / "ran"
    folder.mkdir()
    (folder / "own.py").write_text(CODE.format(str(ran)))
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}')
    with pytest.raises(DistillError, match="--trust-remote-code"):
        load_pretrained(AutoConfig, str(folder))
    assert not ran.exists()
    with load_policy(LoadPolicy(remote_code=True)):
        assert load_pretrained(AutoConfig, str(folder)).model_type == "own"
    assert ran.exists()


def test_a_missing_model_is_reported(tmp_path):
    with pytest.raises(DistillError, match="cannot be loaded"):
        load_pretrained(AutoModelForCausalLM, str(tmp_path / "none"))


def test_a_model_folder_without_a_tokenizer_is_named(tmp_path):
    build("llama", 0).save_pretrained(tmp_path)
    with pytest.raises(DistillError, match=r"has no tokenizer, such as a tokenizer.json. Save the tokenizer"):
        load_pretrained(AutoTokenizer, str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DistillError, match="cannot be loaded"):
        load_pretrained(AutoTokenizer, str(tmp_path))


OWN_LLAMA = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def save_with_code(reference, folder):
    """Save a smoke model as one of an architecture that transformers does not have."""
    shutil.copytree(resolve_model(reference), folder)
    (folder / "own_llama.py").write_text(OWN_LLAMA)
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "own-llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {"AutoConfig": "own_llama.OwnConfig", "AutoModelForCausalLM": "own_llama.OwnForCausalLM"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_model_of_own_code_is_built_from_its_config_if_the_policy_allows_it(tmp_path):
    folder = save_with_code("smoke:llama/student", tmp_path / "model")
    with load_policy(LoadPolicy(remote_code=True)):
        model = model_without_weights(AutoModelForCausalLM, load_pretrained(AutoConfig, str(folder)))
    assert (type(model).__name__, model.device.type) == ("OwnForCausalLM", "meta")


def test_a_run_and_the_commands_that_read_it_work_with_code_of_a_model(run_cli, tmp_path):
    rows, recipe, run = tmp_path / "rows.jsonl", tmp_path / "own.yaml", tmp_path / "run"
    rows.write_text("".join(json.dumps({"text": f"text {i} " * 40}) + "\n" for i in range(8)))
    models = {role: str(save_with_code(f"smoke:llama/{role}", tmp_path / role)) for role in ("student", "teacher")}
    values = {role: {"model": model} for role, model in models.items()}
    train = {"output_dir": str(run), "max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True}
    data = {"task": {"path": str(rows)}, "eval": {"holdout": 0.2}, "max_length": 32}
    recipe.write_text(yaml.safe_dump({**values, "data": data, "train": train}))
    refused = run_cli("run", str(recipe))
    assert refused.returncode == 2
    assert "add --trust-remote-code" in refused.stderr
    assert run_cli("run", str(recipe), "--trust-remote-code").returncode == 0
    assert json.loads((run / "results.json").read_text())["student"]["layers"] == 2
    assert "add --trust-remote-code" in run_cli("diagnose", str(run)).stderr
    cache = str(tmp_path / "cache")
    for command in (
        ["diagnose", str(run)],
        ["inspect", str(run)],
        ["cache", "write", str(recipe), "-o", cache],
        ["cache", "verify", cache, "--against-teacher", "2"],
        ["recipes", "preview", str(recipe)],
    ):
        done = run_cli(*command, "--trust-remote-code")
        assert done.returncode == 0, done.stderr
