"""What a recipe's models may bring: safetensors; pickles and Python only where somebody says so."""

import pytest
import torch
from tiny import build
from transformers import AutoConfig, AutoModelForCausalLM

from hf_distill import DistillError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.model_loading import LoadPolicy, load_policy, load_pretrained

CODE = "from transformers import LlamaConfig\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\nopen({!r}, 'w')\n"


@pytest.fixture
def pickled(tmp_path):
    """A model whose weights are a pickle."""
    model = build("llama", 0)
    model.config.save_pretrained(tmp_path / "m")
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    return str(tmp_path / "m")


def test_pickled_weights_are_read_only_if_somebody_says_so(pickled):
    with pytest.raises(DistillError, match="--allow-pickles"):
        load_pretrained(AutoModelForCausalLM, pickled)
    with load_policy(LoadPolicy(pickles=True)):
        assert load_pretrained(AutoModelForCausalLM, pickled)
    with pytest.raises(DistillError, match="--allow-pickles"):
        load_pretrained(AutoModelForCausalLM, pickled)


def test_a_teacher_that_is_loaded_later_is_read_no_other_way(pickled, tmp_path):
    options = [f"teacher.model={pickled}", f"train.output_dir={tmp_path / 'run'}", "control=null", "data.max_length=32"]
    values = ["teacher.device_map=cpu", "student.model=smoke:llama/student", "student.from_teacher=null"]
    with pytest.raises(DistillError, match="cannot be loaded"):
        run_recipe(load_recipe("quickstart", [*options, *values]))


def test_code_of_a_model_is_run_only_if_somebody_says_so(tmp_path):
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


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(DistillError, match="cannot be loaded"):
        load_pretrained(AutoModelForCausalLM, str(tmp_path / "none"))
