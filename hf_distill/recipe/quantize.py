"""The key `student.quantize`: quantization-aware distillation. Imports no torch."""

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from ..core.quantization_scheme import QuantizationScheme, SchemeName
from ..core.strict_model import StrictModel

if TYPE_CHECKING:
    from .schema import Recipe

# Teachers that are the same after the training of the student, so that another student can be trained with them.
_STATIC_KINDS = {"frozen", "cached", "remote"}


class Quantize(StrictModel):
    """Quantization-aware distillation (2601.20088) with torchao: the student trains as it will be served."""

    scheme: SchemeName = Field(
        description="How the nn.Linear modules of the transformer layers are quantized. int8_weight_only, "
        "int4_weight_only: weights. int8_dynamic_activation: weights, and activations in 8 bits per token. nvfp4: "
        "both, needs a Blackwell GPU (untested). Embeddings, norms and the output head stay in full precision."
    )
    group_size: int | None = Field(
        None,
        ge=2,
        description="Number of weights of a row that share a scale, at least 2; it must divide the width of every "
        "quantized module. Default (null): 32 for 4-bit integers, else the whole row.",
    )
    weight_bits: Literal[4, 8] | None = Field(
        None, description="Scheme int8_dynamic_activation: bits of a weight, 4 or 8. Default (null): 8."
    )

    @property
    def resolved(self) -> QuantizationScheme:
        """The scheme, with its defaults."""
        return QuantizationScheme(self.scheme, self.group_size, self.weight_bits)

    @model_validator(mode="after")
    def _check_scheme(self) -> Self:
        _ = self.resolved
        return self


def quantize_problems(recipe: "Recipe") -> list[str]:
    """List why the quantized student of a recipe cannot be trained or compared; empty if it can or is not there."""
    problems = [
        f"stages.{number}: only the last student can be quantized, because the others teach the next one: remove "
        "student.quantize"
        for number, stage in enumerate(recipe.stages[:-1], 1)
        if stage.student.quantize
    ]
    if recipe.student.quantize is None:
        if recipe.control == "full_precision":
            problems.append("control: full_precision is for a quantized student: add student.quantize, or use sft")
        return problems
    if recipe.control == "full_precision":
        if changing := sorted(recipe.kinds - _STATIC_KINDS):
            problems.append(
                f"control: full_precision trains another student with the same teacher, and a teacher of kind "
                f"{changing[0]} changes with the first one: use sft"
            )
        if recipe.stages:
            problems.append("control: full_precision cannot be combined with stages; use direct")
        if recipe.train.fsdp:
            problems.append(
                "control: full_precision rounds the weights of a trained student, which FSDP shards: use sft"
            )
    if "mtp" in recipe.kinds:
        problems.append(
            "student.quantize: the heads of teacher.kind mtp are exported in full precision: remove one of both"
        )
    if recipe.export == "ema":
        problems.append("student.quantize: export ema writes weights in full precision: remove export")
    if recipe.on_policy and recipe.on_policy.vllm:
        problems.append(
            "student.quantize: on_policy.vllm would generate with the weights in full precision: remove on_policy.vllm"
        )
    return problems
