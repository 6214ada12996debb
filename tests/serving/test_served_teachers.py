"""A served teacher is loaded as a run loads it: quantized, with adapters, or as a recipe names it."""

import pytest
import torch
from tiny import build, collate, rows
from torch.testing import assert_close

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.recipe import load_recipe
from hf_distill.serving.model_choice import spec_of_model, spec_of_recipe
from hf_distill.serving.teacher import load_served_teacher
from hf_distill.teachers import FrozenTeacher
from hf_distill.teachers.remote.rows import token_rows


@pytest.fixture
def folder(tmp_path):
    """A model with layers that bitsandbytes can quantize."""
    build("llama", 1, width=64).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def check_equals_local(folder, tolerance=1e-5, **options):
    """Compare the logits of all target tokens of a batch with those of the local teacher."""
    served = load_served_teacher(spec_of_model(folder, options), max_batch_tokens=256)
    local = FrozenTeacher(folder, **options)
    local.prepare(build("llama", 0), torch.device("cpu"))
    batch = collate(rows("llama", 6))
    targets = Targets.from_batch(batch, True)
    hidden = torch.cat([each["hidden_states"] for each in served.compute_rows(token_rows(batch, targets))])
    assert served.info.dtype == str(hidden.dtype).removeprefix("torch.")
    logits = hidden.float() @ served.head.weight.float().T
    assert_close(logits, local(batch, targets, {}).logits.project().float(), atol=tolerance, rtol=tolerance)
    return served


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_teacher_is_served_as_it_is_loaded_locally(folder, quantization):
    served = check_equals_local(folder, tolerance=0.05, quantization=quantization)
    plain = load_served_teacher(spec_of_model(folder, {}), max_batch_tokens=256)
    assert served.info.quantization == quantization
    assert served.info.weights != plain.info.weights


def test_dtype_and_device_map_apply(folder):
    assert check_equals_local(folder, tolerance=0.1, dtype="bfloat16").info.dtype == "bfloat16"
    check_equals_local(folder, device_map={"": "cpu"})


def test_a_folder_of_adapters_is_served(folder, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    adapted = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj"]),
    )
    adapted.save_pretrained(tmp_path / "adapters")
    served = check_equals_local(str(tmp_path / "adapters"))
    plain = load_served_teacher(spec_of_model(folder, {}), max_batch_tokens=256)
    assert served.info.weights != plain.info.weights
    assert served.info.head == plain.info.head


RECIPE = """
student: {model: "smoke:llama/student"}
TEACHERS
data: {task: {path: "package:builtins"}, eval: {holdout: 0.1}}
train: {output_dir: runs/x, max_steps: 2}
"""
TEACHERS = """
teachers:
  - {name: maths, model: org/maths, dtype: bfloat16, weight: 2.0}
  - {name: chat, kind: remote, url: "http://127.0.0.1:9"}
distill: {temperature: 1.0}
"""


def recipe_of(tmp_path, teachers):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("TEACHERS", teachers))
    return load_recipe(str(tmp_path / "recipe.yaml"))


def test_the_teacher_of_a_recipe_is_chosen_by_name_and_options_replace_its_values(tmp_path):
    recipe = recipe_of(tmp_path, TEACHERS)
    spec = spec_of_recipe(recipe, "maths", {"quantization": "nf4", "dtype": None})
    assert (spec.model, spec.dtype, spec.quantization) == ("org/maths", "bfloat16", "nf4")
    for name, text in ((None, "pass --teacher NAME"), ("law", "no teacher 'law'"), ("chat", "has kind remote")):
        with pytest.raises(DistillError, match=text):
            spec_of_recipe(recipe, name, {})
    with pytest.raises(DistillError, match="--dtype"):
        spec_of_recipe(recipe, "maths", {"dtype": "float8"})


def test_the_source_of_a_cached_teacher_is_served(tmp_path):
    recipe = recipe_of(tmp_path, 'teacher: {kind: cached, path: caches/x, source: {model: "smoke:llama/teacher"}}')
    assert spec_of_recipe(recipe, None, {}).model == "smoke:llama/teacher"


@pytest.mark.parametrize("option", ["fsdp", "deepspeed"])
def test_a_teacher_that_is_sharded_over_processes_is_refused(option):
    spec = spec_of_model("org/x", {"fsdp": True} if option == "fsdp" else {"deepspeed": "zero3-teacher.json"})
    with pytest.raises(DistillError, match="The server is one process"):
        load_served_teacher(spec, max_batch_tokens=256)


@pytest.mark.parametrize("kind", ["t5", "bert"])
def test_models_of_other_types_are_refused(tmp_path, kind):
    build(kind, 0).save_pretrained(tmp_path / kind)
    with pytest.raises(DistillError, match="causal language model"):
        load_served_teacher(spec_of_model(str(tmp_path / kind), {}), max_batch_tokens=256)
