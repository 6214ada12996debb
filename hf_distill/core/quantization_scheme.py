"""How the weights of a quantized student are stored when it is served. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

from ..errors import DistillError, did_you_mean
from .defaults import INT4_GROUP_SIZE

SchemeName = Literal["int8_weight_only", "int4_weight_only", "int8_dynamic_activation", "nvfp4"]
_SCALE_BITS = 16
_NVFP4_BLOCK = 16  # weights that share a scale of 8 bits


@dataclass(frozen=True)
class QuantizationScheme:
    """How the nn.Linear modules in the transformer layers of a student are quantized.

    Attributes:
        name: int8_weight_only or int4_weight_only: integer weights, activations in the dtype of the model.
            int8_dynamic_activation: integer weights, and 8-bit activations with a scale for each token. nvfp4: weights
            and activations in NVFP4.
        group_size: Number of weights of a row that share a scale; None: the whole row, which 4-bit integers do not
            allow. Default: 32 for 4-bit integers, else the whole row.
        weight_bits: Bits of an integer weight of int8_dynamic_activation, 8 or 4. Default: 8.

    Raises:
        DistillError: The scheme is not known, or has no such option.
    """

    name: SchemeName
    group_size: int | None = None
    weight_bits: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(SchemeName):
            raise DistillError(f"{self.name!r} is not a quantization scheme{did_you_mean(self.name, _SCHEMES)}")
        bits = _FIXED_BITS.get(self.name)
        if bits is not None and self.weight_bits is not None:
            raise DistillError(f"{self.name} has weights of {bits} bits: remove weight_bits")
        if self.weight_bits not in (None, 4, 8):
            raise DistillError(f"weight_bits is {self.weight_bits}; it must be 4 or 8")
        if self.group_size is not None and (self.name == "nvfp4" or self.group_size < 2):
            known = (
                f"nvfp4 has a scale for {_NVFP4_BLOCK} weights: remove it"
                if self.name == "nvfp4"
                else "it must be 2 or more"
            )
            raise DistillError(f"group_size is {self.group_size}; {known}")
        object.__setattr__(self, "weight_bits", bits or self.weight_bits or 8)
        if self.weight_bits == 4 and self.name != "nvfp4" and self.group_size is None:
            object.__setattr__(self, "group_size", INT4_GROUP_SIZE)

    @property
    def required_divisor(self) -> int:
        """The number that the width of every quantized layer must be a multiple of."""
        return _NVFP4_BLOCK if self.name == "nvfp4" else self.group_size or 1

    @property
    def description(self) -> str:
        """The scheme in words."""
        if self.name == "nvfp4":
            return "nvfp4 (weights and activations)"
        activations = ", 8-bit activations" if self.name == "int8_dynamic_activation" else ""
        groups = f"groups of {self.group_size}" if self.group_size else "one scale per output channel"
        return f"{self.name} ({self.weight_bits}-bit weights, {groups}{activations})"

    def packed_bytes(self, out_features: int, in_features: int) -> float:
        """Return the bytes of a packed weight [out_features, in_features] with its scales."""
        weights = out_features * in_features
        bits = int(self.weight_bits or 0)
        if self.name == "nvfp4":
            return weights * (bits + 8 / _NVFP4_BLOCK) / 8
        return weights * (bits + _SCALE_BITS / (self.group_size or in_features)) / 8


_SCHEMES = get_args(SchemeName)
_FIXED_BITS = {"int8_weight_only": 8, "int4_weight_only": 4, "nvfp4": 4}
