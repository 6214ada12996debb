"""The key `student.quantize`: quantization-aware distillation. Imports no torch."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ..core.quantization_scheme import QuantizationScheme, SchemeName
from ..core.strict_model import StrictModel


class Quantize(StrictModel):
    """Quantization-aware distillation (2601.20088) with torchao: the student trains as it will be served."""

    scheme: SchemeName = Field(
        description="How the linear layers of the blocks are quantized. int8_weight_only, int4_weight_only: weights. "
        "int8_dynamic_activation: weights, and activations in 8 bits per token. nvfp4: both, needs a Blackwell GPU "
        "(untested). Embeddings, norms and the output head stay in full precision."
    )
    group_size: int | None = Field(
        None,
        ge=2,
        description="Number of weights of a row that share a scale, at least 2; it must divide the width of every "
        "layer. Default (null): 32 for 4-bit integers, else the whole row.",
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
