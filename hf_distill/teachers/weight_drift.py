"""How far a teacher has moved, told by a sample of its numbers: another copy of a model would be too dear."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SAMPLED = 4096  # numbers of each tensor, about


class WeightDrift:
    """From where a model began, as a share of its norm there.

    start: name -> about every k-th number of each tensor as it was
    """

    def __init__(self):
        self.start: dict[str, Tensor] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Here."""
        self.start = {name: _sample(local_shard(tensor)).detach().float().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def to(self, tensors: Mapping[str, Tensor], shared: bool) -> float:
        """To where the tensors are now; `shared`: each rank holds a share of them."""
        squares = torch.zeros(2, dtype=torch.float64, device=local_shard(next(iter(tensors.values()))).device)
        for name, start in self.start.items():
            now = local_shard(tensors[name])
            infinite = start.isinf()  # of a mask among the buffers
            start = start.masked_fill(infinite, 0)
            moved = _sample(now).float().masked_fill(infinite, 0) - start
            share = now.numel() / max(start.numel(), 1)
            squares += share * torch.stack([moved.square().sum(), start.square().sum()]).double()
        if shared:
            torch.distributed.all_reduce(squares)
        return float((squares[0] / squares[1]).sqrt())


def local_shard(tensor: Any) -> Tensor:
    """What this rank holds of a tensor."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether ranks hold shares of a model's parameters (ZeRO-3, FSDP2)."""
    return any(hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters())


def _sample(values: Tensor) -> Tensor:
    flat = values.flatten()
    return flat[:: max(1, len(flat) // _SAMPLED)]
