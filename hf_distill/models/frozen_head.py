"""The output head of a frozen model on the student's device and in the dtype of the products, copied once."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..core.logits import LazyLogits, LogitScaling, enabled_autocast_dtype
from .output_head import head_module
from .sharding import is_sharded

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


@dataclass
class FrozenHead:
    """Makes lazy logits of a frozen model; its head is cast and moved to the student's device once, and not each step.

    The copy is made again when the weight was changed in place or has another address, as that of a head that is
    gathered or loaded from the disk for each forward, and when its sample has other values: a change through
    `weight.data` has no other trace. A head that needs neither a cast nor a move is not copied.

    sample: the values of `head_sample` before a forward; None if they were not read
    ids:    [V'] the ids whose rows are copied, of V; None: all
    """

    sample: tuple[int, ...] | None = None
    ids: Tensor | None = None
    _source: tuple | None = None
    _weight: Tensor | None = None
    _bias: Tensor | None = None

    def lazy_logits(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, scaling: LogitScaling, device: torch.device
    ) -> LazyLogits:
        """Return logits whose hidden states are on the model's device, and whose head is on the student's.

        Args:
            hidden: [T, H] input of the output head.
            weight: [V, H] of the output head.
            bias: [V] of the output head, or None.
            scaling: scale and soft cap after the head.
            device: the student's device.

        Returns:
            logits of V ids, or of those in `ids`.
        """
        dtype = enabled_autocast_dtype(hidden.device)
        hidden_dtype, weight_dtype = (
            t.dtype if dtype is None or t.dtype == torch.float64 else dtype for t in (hidden, weight)
        )
        hidden = hidden.to(hidden_dtype)
        if self.ids is None and weight.device == device and weight.dtype == weight_dtype:
            return LazyLogits.of_head(hidden, weight, bias, scaling)
        tensors = (None if t is None else (t.data_ptr(), _version(t)) for t in (weight, bias))
        source = (device, weight_dtype, self.sample, *tensors)
        if source != self._source:
            self._source = self._weight = self._bias = None  # free the earlier copy first
            self._weight = self._rows(weight).to(device, weight_dtype)
            self._bias = None if bias is None else self._rows(bias).to(device, weight_dtype)
            self._source = source
        assert self._weight is not None
        return LazyLogits(hidden, self._weight, self._bias, scaling)

    def _rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of the weight or bias that are copied."""
        tensor = tensor.detach()
        return tensor if self.ids is None else tensor[self.ids.to(tensor.device)]


def head_sample(model: nn.Module, device: torch.device, is_copied: bool = False) -> Tensor | None:
    """Return integers on the student's device that change with the weights of an output head, of about 4,096 numbers.

    They are sums of the bits. A change of a few rows through `weight.data` may be outside of the sample.

    Args:
        model: the model.
        device: the student's device.
        is_copied: whether the head is copied even if it needs neither a cast nor a move.

    Returns:
        [1] or [2], for weight and bias; None if the head needs no copy, or has its values during the forward only.
    """
    head = head_module(model)
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2 or is_sharded(model):
        return None
    is_offloaded = weight.is_meta and type(weight.data) is Tensor
    needs_copy = is_copied or weight.device != device or weight.dtype == torch.float32  # which autocast may cast
    if is_offloaded or not needs_copy:
        return None
    sums = [_bits(part).sum() for part in (weight, bias) if isinstance(part, Tensor)]
    return torch.stack(sums).to(device)


def _bits(tensor: Tensor) -> Tensor:
    """Return elements of a tensor, at most 64 to 127 of each dimension, as integers of their size."""
    slices = tuple(slice(None, None, max(1, size // 64)) for size in tensor.shape)
    return tensor.detach()[slices].contiguous().view(_INTEGERS[tensor.element_size()])


def _version(tensor: Tensor) -> int:
    """Return a number that changes when a tensor is changed in place; tensors of `inference_mode` have none."""
    return 0 if tensor.is_inference() else tensor._version
