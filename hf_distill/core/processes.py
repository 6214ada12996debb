"""Calls that the main process of a distributed launch makes for all processes."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

from ..errors import DistillError, RunError, RunInterrupted

T = TypeVar("T")


def is_alone() -> bool:
    """Whether this process is the only one of its launch."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def any_process(is_true: bool, device: torch.device) -> bool:
    """Return whether a condition holds on any process; every process has to call this.

    Args:
        is_true: the condition on this process.
        device: the device of this process, where the backend of `torch.distributed` communicates.
    """
    if is_alone():
        return is_true
    flag = torch.tensor(is_true, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)


def run_on_main(call: Callable[[], T]) -> T:
    """Run `call()` on the main process only, and return its result on all processes.

    Raises:
        DistillError, RunError, RunInterrupted: on all processes, if `call` raises one of them.
        RunError: on the other processes, if `call` raises another exception, which the main process raises itself.
    """
    if is_alone():
        return call()
    message: list[object] = [None, None]
    failure: BaseException | None = None
    if torch.distributed.get_rank() == 0:
        try:
            message[0] = call()
        except BaseException as error:  # the other processes would wait until their timeout
            failure, message[1] = error, _to_plain(error)
    torch.distributed.broadcast_object_list(message)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise _from_plain(*cast(tuple[str, str | int | None], message[1]))
    return cast(T, message[0])


def _to_plain(error: BaseException) -> tuple[str, str | int | None]:
    """Return an error as plain values, because not every exception can be pickled."""
    if isinstance(error, RunInterrupted):
        return "RunInterrupted", error.code
    for kind in (DistillError, RunError):
        if isinstance(error, kind):
            return kind.__name__, str(error)
    return type(error).__name__, str(error).partition("\n")[0][:500]


def _from_plain(kind: str, value: str | int | None) -> BaseException:
    known: dict[str, type[BaseException]] = {
        "RunInterrupted": RunInterrupted,
        "DistillError": DistillError,
        "RunError": RunError,
    }
    return known[kind](value) if kind in known else RunError(f"Rank 0 failed with {kind}: {value}")
