"""The processes that write a cache together; a single one without torch.distributed."""

from typing import TypeVar

import torch

from ..core.processes import is_alone

_T = TypeVar("_T")


def rank() -> int:
    """Return the rank of this process."""
    return 0 if is_alone() else torch.distributed.get_rank()


def world_size() -> int:
    """Return the number of processes."""
    return 1 if is_alone() else torch.distributed.get_world_size()


def barrier() -> None:
    """Wait until all processes have called this function."""
    if not is_alone():
        torch.distributed.barrier()


def gather_lists(values: list[_T]) -> list[_T]:
    """Concatenate the lists of all processes in the order of their ranks; all processes must call it."""
    if is_alone():
        return values
    lists: list[list[_T]] = [[]] * world_size()
    torch.distributed.all_gather_object(lists, values)
    return [value for rank_values in lists for value in rank_values]
