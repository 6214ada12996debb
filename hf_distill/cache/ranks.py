"""The processes that write a cache together; a single one without torch.distributed."""

from typing import TypeVar

import torch

_T = TypeVar("_T")


def rank() -> int:
    """Return the rank of this process."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """Return the number of processes."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def barrier() -> None:
    """Wait until all processes have called this function."""
    if _is_distributed():
        torch.distributed.barrier()


def gather_lists(values: list[_T]) -> list[_T]:
    """Concatenate the lists of all processes in the order of their ranks; all processes must call it."""
    if not _is_distributed():
        return values
    lists: list[list[_T]] = [[]] * world_size()
    torch.distributed.all_gather_object(lists, values)
    return [value for rank_values in lists for value in rank_values]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
