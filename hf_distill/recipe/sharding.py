"""Checks of a recipe's sharding options that need no machine. Imports no torch."""

from typing import TYPE_CHECKING

from ..core.deepspeed_config import zero_options

if TYPE_CHECKING:
    from .schema import Recipe


def sharding_problems(recipe: "Recipe") -> list[str]:
    """List why the student of a recipe cannot be sharded as `train` says; empty if it can, or is not sharded."""
    train, student, problems = recipe.train, recipe.student, []
    zero = zero_options(train.deepspeed)
    if train.deepspeed and train.fsdp:
        problems.append("train.deepspeed and train.fsdp exclude each other: remove one of them")
    if student.quantization and (zero.get("stage") == 3 or train.fsdp):
        problems.append(
            "student.quantization: a quantized student cannot be sharded: use DDP, or train.deepspeed with "
            "zero1-student.json or zero2-student.json"
        )
    if student.quantize and zero.get("stage") == 3:
        problems.append(
            "student.quantize: ZeRO-3 shards the weights that each layer rounds as a whole: use DDP, or "
            "train.deepspeed with zero1-student.json or zero2-student.json"
        )
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is False:
        problems.append(
            "train.deepspeed: stage3_gather_16bit_weights_on_model_save is false, so the student would be saved as "
            "shards that from_pretrained cannot load: set it to true"
        )
    return problems
