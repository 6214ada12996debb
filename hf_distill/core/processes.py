"""What one process of a launch does for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from ..errors import DistillError, RunError, RunInterrupted

T = TypeVar("T")


def is_alone() -> bool:
    """Whether this process has no others to wait for."""
    return not (torch.distributed.is_available() and torch.distributed.is_initialized())


def run_on_main(call: Callable[[], T]) -> T:
    """`call()` on the main process alone; every process gets what it returned, or an error if it failed.

    Raises:
        DistillError, RunError, Interrupted: on all processes, if `call` raised one of them.
        RunError: on the other processes, if `call` raised anything else, which the main process raises.
    """
    if is_alone():
        return call()
    message: list[Any] = [None, None]
    failure: BaseException | None = None
    if torch.distributed.get_rank() == 0:
        try:
            message[0] = call()
        except BaseException as error:  # the others would wait for this process until their timeout
            failure, message[1] = error, _described(error)
    torch.distributed.broadcast_object_list(message)
    if failure is not None:
        raise failure
    if message[1] is not None:
        raise _remade(*message[1])
    return message[0]


def _described(error: BaseException) -> tuple[str, Any]:
    """An error as plain values: not every exception can be pickled."""
    if isinstance(error, RunInterrupted):
        return "Interrupted", error.code
    for kind in (DistillError, RunError):
        if isinstance(error, kind):
            return kind.__name__, str(error)
    return type(error).__name__, str(error).partition("\n")[0][:500]


def _remade(kind: str, value: Any) -> BaseException:
    known: dict[str, type[BaseException]] = {
        "Interrupted": RunInterrupted,
        "DistillError": DistillError,
        "RunError": RunError,
    }
    return known[kind](value) if kind in known else RunError(f"Rank 0 failed with {kind}: {value}")
