"""Sharding options that cannot train a student are refused as the recipe is validated, without a launch."""

import pytest

from hf_distill.errors import DistillError
from hf_distill.recipe import load_recipe

ZERO3 = "train.deepspeed=zero3-student-offload.json"


@pytest.mark.parametrize(
    ("recipe", "changes", "message"),
    [
        ("quickstart", ["train.fsdp=true", "train.deepspeed=zero2-student.json"], "exclude each other"),
        ("llama-70b-to-8b-nf4", ["student.quantization=nf4", ZERO3], "student.quantization: .* cannot be sharded"),
        ("llama-70b-to-8b-nf4", ["student.quantization=nf4", "train.fsdp=true"], "cannot be sharded: use DDP"),
        ("quantized-student", [ZERO3], "student.quantize: ZeRO-3 shards the weights .* zero2-student.json"),
        (
            "quickstart",
            ["train.deepspeed={zero_optimization: {stage: 3, stage3_gather_16bit_weights_on_model_save: false}}"],
            "would be saved as shards that from_pretrained cannot load: set it to true",
        ),
    ],
)
def test_sharding_that_cannot_work_is_refused_by_validation(recipe, changes, message):
    with pytest.raises(DistillError, match=message):
        load_recipe(recipe, changes)


@pytest.mark.parametrize(
    ("recipe", "change"),
    [
        ("quantized-student", "train.deepspeed=zero2-student.json"),
        ("quantized-student", "train.fsdp=true"),
        ("llama-70b-to-8b-nf4", "train.deepspeed=zero2-student.json"),
        ("quickstart", ZERO3),
    ],
)
def test_sharding_that_works_is_valid(recipe, change):
    changes = [change, "control=null"] if recipe == "quantized-student" else [change]
    assert load_recipe(recipe, changes).train
