"""The load policy: safetensors are always allowed, pickles and Python code only if the user allows them."""

import pytest
import torch
from tiny import build
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillError
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.runner.model_loading import LoadPolicy, load_policy, load_pretrained

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
