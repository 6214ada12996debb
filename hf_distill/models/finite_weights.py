"""Checks that weights are finite before they are written to a file."""

import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunError


def check_finite(
    tensors: Mapping[str, Tensor], path: str | Path, *, owner: str, advice: str, buffers: Collection[str] = ()
) -> None:
    """Check that all weights are finite before they are written.

    Args:
        tensors: tensors to write, by name.
        path: file or folder that they are written to, for the error message.
        owner: model whose weights they are, for the error message, such as "the peer".
        advice: what the user can do, for the error message.
        buffers: names of the tensors that are buffers; these may be infinite (masks), but not NaN.

    Raises:
        RunError: a tensor is not finite; the message names the first one.
    """
    weights = {name: tensor for name, tensor in tensors.items() if name not in buffers}
    name = first_nonfinite(weights, {name: tensor for name, tensor in tensors.items() if name in buffers})
    if name is not None:
        raise RunError(f"The weights of {owner} are not finite (first: {name}). Nothing is written to {path}. {advice}")


def first_nonfinite(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first weight with a NaN or an infinity, or buffer with a NaN; None if all are finite.

    Each tensor is read once, and the device is synchronized once. Quantized tensors are skipped.

    Args:
        weights: parameters by name.
        buffers: buffers by name.
    """
    weights = {name: tensor for name, tensor in weights.items() if _can_be_nonfinite(tensor)}
    buffers = {name: tensor for name, tensor in buffers.items() if _can_be_nonfinite(tensor)}
    largest = [_largest(weights.values()), _largest(buffers.values())]
    if largest[0].isfinite() and not largest[1].isnan():
        return None
    nonfinite = [name for name, tensor in weights.items() if not tensor.isfinite().all()]
    return next(iter([*nonfinite, *(name for name, tensor in buffers.items() if tensor.isnan().any())]), None)


def _can_be_nonfinite(tensor: Tensor) -> bool:
    """Whether a tensor has values of a dtype that can be NaN or infinite; 8-bit floats are quantized weights."""
    return (
        tensor.is_floating_point() and tensor.element_size() > 1 and tensor.device.type != "meta" and tensor.numel() > 0
    )


def _largest(tensors: Iterable[Tensor]) -> Tensor:
    """Return the largest magnitude, []; NaN if a value is NaN."""
    return torch.nn.utils.get_total_norm([t.detach() for t in tensors], norm_type=math.inf).cpu()
