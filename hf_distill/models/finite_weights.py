"""The one check that all weights pass before a file of them is written: none is NaN or infinite."""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunError


def check_finite(
    tensors: Mapping[str, Tensor], path: str | Path, *, owner: str, advice: str, buffers: Collection[str] = ()
) -> None:
    """Refuse to write weights that are not finite.

    Args:
        tensors: what is to be written, by name.
        path: the file or folder that it is written to, for the error.
        owner: whose weights they are, for the error, such as "the peer".
        advice: what the reader of the error can do.
        buffers: names of tensors that are no parameters; masks among them may hold infinities.

    Raises:
        RunError: names the first tensor that is not finite.
    """
    weights = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    name = first_nonfinite(weights, {name: tensor for name, tensor in tensors.items() if name in buffers})
    if name is not None:
        raise RunError(f"The weights of {owner} are not finite (first: {name}). Nothing is written to {path}. {advice}")


def first_nonfinite(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> str | None:
    """The first weight with a NaN or an infinity, or buffer with a NaN; None: there is none.

    It reads each tensor once and waits for the device once. Quantised tensors are passed over.
    """
    weights = {name: tensor for name, tensor in weights.items() if _can_be_nonfinite(tensor)}
    buffers = {name: tensor for name, tensor in buffers.items() if _can_be_nonfinite(tensor)}
    largest = [_largest(weights.values()), _largest(buffers.values())]
    if largest[0].isfinite() and not largest[1].isnan():
        return None
    broken = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    return next(iter([*broken, *(name for name, tensor in buffers.items() if tensor.isnan().any())]), None)


def _can_be_nonfinite(tensor: Tensor) -> bool:
    """Whether it has values in a dtype that can be NaN or infinite; 8-bit floats are quantised weights."""
    return (
        tensor.is_floating_point() and tensor.element_size() > 1 and tensor.device.type != "meta" and tensor.numel() > 0
    )


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """The largest magnitude, which is NaN where a value is, []."""
    return torch.nn.utils.get_total_norm([t.detach() for t in tensors], norm_type=math.inf).cpu()
