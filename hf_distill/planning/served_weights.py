"""Size of a quantized student's weights when it is served, and in the checkpoint that a run writes."""

from ..core.quantization_scheme import QuantizationScheme
from .model_stats import ModelStats

_MIB = 2**20
_HALF, _FULL = 2, 4  # bytes of a weight
_GROUP_BYTES = 5  # of a scale in float32 and its zero point


def served_weights(student: ModelStats, scheme: QuantizationScheme) -> str:
    """Describe the sizes of a quantized student's weights in a sentence.

    Args:
        student: its sizes.
        scheme: its quantization.
    """
    linear = student.linear.values()
    others = student.parameters - student.linear_weights
    packed = sum(scheme.packed_bytes(out, width) for width, out in linear)
    if scheme.name == "nvfp4":
        stored = packed
    else:  # torchao stores an integer of 4 bits in a byte
        stored = sum(
            width * out + out * (width // (scheme.group_size or width)) * _GROUP_BYTES for width, out in linear
        )
    return (
        f"Served as {scheme.description}, the student's weights take {_size(packed + _HALF * others)} if integers are "
        f"packed and all other weights have 16 bits, instead of {_size(_HALF * student.parameters)} in 16 bits. The "
        f"checkpoint of the run takes about {_size(stored + _FULL * others)}, with integers of 8 bits and float32."
    )


def rounding_memory(student: ModelStats) -> str:
    """Describe what the backward pass of a quantized student keeps in addition, which a plan does not count."""
    kept = 2 * _FULL * student.linear_weights
    return (
        f"the rounded weights that the backward pass keeps, {_size(kept)} (two float32 numbers per weight), or those "
        "of one layer with activation checkpointing"
    )


def _size(count: float) -> str:
    return f"{count / _MIB:,.0f} MiB"
