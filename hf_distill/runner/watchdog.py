"""Processes that wait for one another: which of them is gone or stuck is said, and those that wait are ended."""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.distributed import distributed_c10d
from transformers import TrainerCallback

from ..errors import RunError

_TICK = 1.0  # seconds between two signs of life
_SILENT = 5.0  # seconds without one: gone
_FAILED, _HEARD = "hf_distill-failed", "hf_distill-heard"  # keys of the store
_WAITING = (
    "/torch/distributed/",
    "/torch/nn/parallel/distributed.py",
    "/torch/autograd/graph.py",
    "/deepspeed/comm/",
)  # where a process waits for others


class HangWatchdog(TrainerCallback):
    """A thread of each process: it gives signs of life, and says where the process is.

    Where a process has waited for others for most of the time that one may wait, or where a collective fails, those
    that do not wait, or give no sign of life, are named. Where one fails, the others end with its message.

    Args:
        timeout: seconds that a process may wait (`ddp_timeout`).
    """

    def __init__(self, timeout: float):
        self._patience = 0.9 * timeout  # before the collective itself gives up, which names nobody
        self._steps = self._beat = 0
        self._over = threading.Event()
        self._failure: str | None = None  # of another process

    def on_step_end(self, args, state, control, **kwargs):
        """Training goes on."""
        self._steps += 1

    def on_substep_end(self, args, state, control, **kwargs):
        """Training goes on."""
        self._steps += 1

    def on_prediction_step(self, args, state, control, **kwargs):
        """Evaluation goes on."""
        self._steps += 1

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While it lasts, the processes are watched; alone there is nothing to watch.

        Raises:
            RunError: a collective failed, for one of the processes is gone; says which.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            yield
            return
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store: Any = distributed_c10d._get_default_store().clone()  # a connection of its own
        self._main = threading.get_ident()
        if self._rank == 0:  # an earlier run of these processes may have failed
            self._store.delete_key(_FAILED)
            self._store.delete_key(_HEARD)
        self._tell(False, "its beginning")  # others may ask before the first tick
        thread = threading.Thread(target=self._run, name="hf_distill-watch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and self._failure:
                raise RunError(self._failure) from error
            if isinstance(error, RuntimeError) and not isinstance(error, RunError) and (named := self._gone()):
                first = str(error).partition("\n")[0][:200]
                raise RunError(f"{named} The others cannot go on without it ({first}). {_WHAT_NOW}") from error
            self._announce(error)
            raise
        finally:
            self._over.set()
            thread.join()

    def _announce(self, error: BaseException) -> None:
        """Tell the other processes that this one ends; rank 0, which may hold the store, waits until they know."""
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
        with suppress(RuntimeError):  # the store is gone with its process, and the collectives of the others fail
            self._store.set(_FAILED, json.dumps([self._rank, reason]))
            self._store.add(_HEARD, int(self._rank != 0))
            end = time.monotonic() + _SILENT
            while self._rank == 0 and time.monotonic() < end and self._store.add(_HEARD, 0) < self._world - 1:
                time.sleep(_TICK / 4)

    def _end_with_another(self) -> None:
        """End this process if another one failed and the main thread, which may wait for it, does not end by itself."""
        try:
            if not self._store.check([_FAILED]):
                return
            rank, reason = json.loads(self._store.get(_FAILED))
            if rank == self._rank:
                return
            self._failure = f"Rank {rank} failed: {reason}. Rank {self._rank} cannot go on without it."
            self._store.add(_HEARD, 1)
        except RuntimeError:
            return
        if self._over.wait(_SILENT):
            return
        sys.stderr.write(f"Error: {self._failure}\n")
        sys.stderr.flush()
        os._exit(1)

    def _run(self) -> None:
        before, since = None, time.monotonic()
        while not self._over.wait(_TICK):
            waits, where, stack = _place(self._main)
            self._tell(waits, where)
            self._end_with_another()
            now = (self._steps, stack) if waits else None
            if now is None or now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > self._patience:
                sys.stderr.write(f"Error: {self._stuck(time.monotonic() - since)} {_WHAT_NOW}\n")
                sys.stderr.flush()
                os._exit(1)  # the main thread waits in a collective, where no exception reaches it

    def _tell(self, waits: bool, where: str) -> None:
        self._beat += 1
        try:
            self._store.set(f"hf_distill-{self._rank}", json.dumps([self._beat, waits, where]))
        except RuntimeError:  # of a store that went with its process: the collectives fail, too
            self._over.set()

    def _others(self) -> dict[int, tuple[int, bool, str]]:
        ranks = [rank for rank in range(self._world) if rank != self._rank]
        found = self._store.multi_get([f"hf_distill-{rank}" for rank in ranks])
        return {rank: tuple(json.loads(told)) for rank, told in zip(ranks, found, strict=True)}

    def _silent(self) -> tuple[dict[int, str], dict[int, tuple[int, bool, str]]]:
        """Ranks that give no sign of life, with the last place that they told; and what the others say."""
        before = self._others()
        end = time.monotonic() + _SILENT
        while time.monotonic() < end:
            time.sleep(_TICK)
            now = self._others()
            silent = {rank: now[rank][2] for rank in now if now[rank][0] == before[rank][0]}
            if not silent:
                break
        return silent, now

    def _gone(self) -> str | None:
        try:
            silent, _ = self._silent()
        except RuntimeError:
            return "Rank 0, which keeps the processes together, is gone."
        told = "; ".join(f"rank {rank} is gone (last seen at {where})" for rank, where in silent.items())
        return told[:1].upper() + told[1:] + "." if told else None

    def _stuck(self, seconds: float) -> str:
        try:
            silent, others = self._silent()
        except RuntimeError:
            return "Rank 0, which keeps the processes together, is gone."
        busy = {rank: where for rank, (_, waits, where) in others.items() if not waits and rank not in silent}
        told = [f"rank {rank} gives no sign of life (last seen at {where})" for rank, where in silent.items()]
        told += [f"rank {rank} is at {where}" for rank, where in busy.items()]
        if not told:
            told = ["all ranks wait for one another"] + [f"rank {r} at {where}" for r, (_, _, where) in others.items()]
        return f"Rank {self._rank} has waited for {seconds:.0f} s: {'; '.join(told)}."


_WHAT_NOW = "Its own log may tell why (exit code -9: often a want of memory). --resume goes on from a checkpoint."


def _place(thread: int) -> tuple[bool, str, Any]:
    """Whether a thread waits for other processes, the place in words, and its stack."""
    frame, stack = sys._current_frames().get(thread), []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if not stack:
        return False, "its end", None
    waits = any(part in stack[0][0].replace(os.sep, "/") for part in _WAITING)
    own = next((place for place in stack if "/torch/" not in place[0].replace(os.sep, "/")), stack[0])
    file, line, name = own if waits else stack[0]
    return waits, f"{os.sep.join(file.split(os.sep)[-2:])}:{line} in {name}", tuple(stack)
