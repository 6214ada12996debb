"""The processes that write a cache together; one where nothing is distributed."""

from typing import Any

import torch


def rank() -> int:
    """The number of this process."""
    return torch.distributed.get_rank() if _is_distributed() else 0


def world_size() -> int:
    """How many processes there are."""
    return torch.distributed.get_world_size() if _is_distributed() else 1


def barrier() -> None:
    """Wait until all processes are here."""
    if _is_distributed():
        torch.distributed.barrier()


def gather_lists(values: list[Any]) -> list[Any]:
    """The lists of all processes, joined in the order of the processes; called on all of them."""
    if not _is_distributed():
        return values
    lists: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(lists, values)
    return [value for one in lists for value in one]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
