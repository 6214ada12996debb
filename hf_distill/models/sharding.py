"""Tensors that are sharded over ranks (ZeRO-3, FSDP2): gathering, the shard of this rank, distributing a value."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule


def local_shard(tensor: Any) -> Tensor:
    """Return the part of a tensor that this rank holds; all of an unsharded one."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether each rank holds a shard of the model's parameters (ZeRO-3, FSDP2)."""
    return any(hasattr(p, "ds_tensor") or hasattr(p, "to_local") for p in model.parameters())


def reshard(model: nn.Module) -> bool:
    """Free the parameters that FSDP2 left gathered after a forward without a backward; return whether it shards any.

    Until then the modules of the model have other parameters than those that are trained.
    """
    is_fsdp2 = False
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
            is_fsdp2 = True
    return is_fsdp2


def gathered(parameters: Iterable[nn.Parameter], modify: bool = False) -> AbstractContextManager[object]:
    """Return a context manager that gathers the parameters that ZeRO-3 partitions. Every rank has to enter it.

    Args:
        parameters: partitioned or not.
        modify: whether the values that rank 0 writes are distributed at the end.
    """
    parameters = list(parameters)
    if not any(hasattr(parameter, "ds_tensor") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0 if modify else None)


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the unsharded tensor of one that FSDP2 sharded, and any other unchanged. Every rank has to call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return an unsharded value with the placement of a parameter, which FSDP2 may have sharded."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
