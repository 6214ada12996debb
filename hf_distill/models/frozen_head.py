"""The output head of a frozen model on the student's device and in the dtype of the products, copied once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.logits import LazyLogits, LogitScaling, enabled_autocast_dtype


@dataclass
class FrozenHead:
    """Makes lazy logits of a frozen model; its head is cast and moved to the student's device once, and not each step.

    The copy is made again when the weight was changed in place or has another address, as that of a head that is
    gathered or loaded from the disk for each forward. A change through `weight.data` is not seen. A head that needs
    neither a cast nor a move is not copied.
    """

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
        """
        dtype = enabled_autocast_dtype(hidden.device)
        hidden_dtype, weight_dtype = (
            t.dtype if dtype is None or t.dtype == torch.float64 else dtype for t in (hidden, weight)
        )
        hidden = hidden.to(hidden_dtype)
        if weight.device == device and weight.dtype == weight_dtype:
            return LazyLogits.of_head(hidden, weight, bias, scaling)
        source = (device, weight_dtype, *(None if t is None else (t.data_ptr(), _version(t)) for t in (weight, bias)))
        if source != self._source:
            self._source = self._weight = self._bias = None  # free the earlier copy first
            self._weight = weight.detach().to(device, weight_dtype)
            self._bias = None if bias is None else bias.detach().to(device, weight_dtype)
            self._source = source
        assert self._weight is not None
        return LazyLogits(hidden, self._weight, self._bias, scaling)


def _version(tensor: Tensor) -> int:
    """Return a number that changes when a tensor is changed in place; tensors of `inference_mode` have none."""
    return 0 if tensor.is_inference() else tensor._version
