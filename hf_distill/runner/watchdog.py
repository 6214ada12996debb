"""A watchdog for distributed runs: it names ranks that died or hang, and ends the ranks that wait for them."""

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
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RunError

_HEARTBEAT_SECONDS = 1.0  # interval of heartbeats
_SILENT_SECONDS = 5.0  # without a heartbeat for this long, a rank counts as dead
_FAILED_KEY, _RECEIVED_KEY = "hf_distill-failed", "hf_distill-received"  # keys in the store of torch.distributed
_WAITING_PATHS = (
    "/torch/distributed/",
    "/torch/nn/parallel/distributed.py",
    "/torch/autograd/graph.py",
    "/deepspeed/comm/",
)  # code in which a rank waits for others


class HangWatchdog(TrainerCallback):
    """Watches the ranks of a run from a thread in each process, which sends heartbeats with the current location.

    If a rank has waited for others for 90 % of the timeout, or if a collective fails, the error names the ranks that do
    not wait or send no heartbeats. If a rank fails, the other ranks end with its message.

    Args:
        timeout: Seconds that a process may wait in a collective (`ddp_timeout`).
    """

    def __init__(self, timeout: float):
        self._timeout_seconds = 0.9 * timeout  # earlier than the timeout of the collective, which names no rank
        self._steps = self._heartbeats = 0
        self._over = threading.Event()
        self._failure: str | None = None  # of another process

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Training goes on."""
        self._steps += 1

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Training goes on."""
        self._steps += 1

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Evaluation goes on."""
        self._steps += 1

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the ranks while the block runs. A single process is not watched.

        Raises:
            RunError: A collective failed because a rank died. The message names the rank.
        """
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            yield
            return
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        default_store: Any = distributed_c10d._get_default_store()
        self._store = default_store.clone()  # the thread needs a separate connection
        self._main = threading.get_ident()
        if self._rank == 0:  # an earlier run of these processes may have failed
            self._store.delete_key(_FAILED_KEY)
            self._store.delete_key(_RECEIVED_KEY)
        self._send_heartbeat(False, "its start")  # others may read it before the first interval ends
        thread = threading.Thread(target=self._run, name="hf_distill-watch", daemon=True)
        thread.start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, RuntimeError) and self._failure:
                raise RunError(self._failure) from error
            if (
                isinstance(error, RuntimeError)
                and not isinstance(error, RunError)
                and (named := self._describe_dead_ranks())
            ):
                first = str(error).partition("\n")[0][:200]
                raise RunError(f"{named} The others cannot go on without it ({first}). {_ADVICE}") from error
            self._announce_failure(error)
            raise
        finally:
            self._over.set()
            thread.join()

    def _announce_failure(self, error: BaseException) -> None:
        """Announce the failure to the other ranks. Rank 0, which may host the store, waits until they received it."""
        reason = f"{type(error).__name__}: {error}".partition("\n")[0][:500]
        with suppress(RuntimeError):  # the process of the store ended, so the collectives of the others fail too
            self._store.set(_FAILED_KEY, json.dumps([self._rank, reason]))
            self._store.add(_RECEIVED_KEY, int(self._rank != 0))
            end = time.monotonic() + _SILENT_SECONDS
            while self._rank == 0 and time.monotonic() < end and self._store.add(_RECEIVED_KEY, 0) < self._world - 1:
                time.sleep(_HEARTBEAT_SECONDS / 4)

    def _exit_if_another_rank_failed(self) -> None:
        """Exit if another rank failed and the main thread of this one, which may wait for it, does not end."""
        try:
            if not self._store.check([_FAILED_KEY]):
                return
            rank, reason = json.loads(self._store.get(_FAILED_KEY))
            if rank == self._rank:
                return
            self._failure = f"Rank {rank} failed: {reason}. Rank {self._rank} cannot go on without it."
            self._store.add(_RECEIVED_KEY, 1)
        except RuntimeError:
            return
        if self._over.wait(_SILENT_SECONDS):
            return
        sys.stderr.write(f"Error: {self._failure}\n")
        sys.stderr.flush()
        os._exit(1)

    def _run(self) -> None:
        before, since = None, time.monotonic()
        while not self._over.wait(_HEARTBEAT_SECONDS):
            waits, location, stack = _stack_location(self._main)
            self._send_heartbeat(waits, location)
            self._exit_if_another_rank_failed()
            now = (self._steps, stack) if waits else None
            if now is None or now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout_seconds:
                sys.stderr.write(f"Error: {self._describe_hang(time.monotonic() - since)} {_ADVICE}\n")
                sys.stderr.flush()
                os._exit(1)  # an exception cannot interrupt a collective in the main thread

    def _send_heartbeat(self, waits: bool, location: str) -> None:
        self._heartbeats += 1
        try:
            self._store.set(f"hf_distill-{self._rank}", json.dumps([self._heartbeats, waits, location]))
        except RuntimeError:  # the process of the store ended, so the collectives fail too
            self._over.set()

    def _other_ranks(self) -> dict[int, tuple[int, bool, str]]:
        ranks = [rank for rank in range(self._world) if rank != self._rank]
        values = self._store.multi_get([f"hf_distill-{rank}" for rank in ranks])
        return {rank: tuple(json.loads(heartbeat)) for rank, heartbeat in zip(ranks, values, strict=True)}

    def _find_silent_ranks(self) -> tuple[dict[int, str], dict[int, tuple[int, bool, str]]]:
        """Return the ranks without heartbeats with their last location, and the last heartbeats of all other ranks."""
        before = self._other_ranks()
        end = time.monotonic() + _SILENT_SECONDS
        while time.monotonic() < end:
            time.sleep(_HEARTBEAT_SECONDS)
            now = self._other_ranks()
            silent = {rank: now[rank][2] for rank in now if now[rank][0] == before[rank][0]}
            if not silent:
                break
        return silent, now

    def _describe_dead_ranks(self) -> str | None:
        try:
            silent, _ = self._find_silent_ranks()
        except RuntimeError:
            return "Rank 0, which hosts the store of the process group, has ended."
        text = "; ".join(f"rank {rank} has ended (last seen at {location})" for rank, location in silent.items())
        return text[:1].upper() + text[1:] + "." if text else None

    def _describe_hang(self, seconds: float) -> str:
        try:
            silent, others = self._find_silent_ranks()
        except RuntimeError:
            return "Rank 0, which hosts the store of the process group, has ended."
        busy = {rank: location for rank, (_, waits, location) in others.items() if not waits and rank not in silent}
        descriptions = [
            f"rank {rank} sends no heartbeat (last seen at {location})" for rank, location in silent.items()
        ]
        descriptions += [f"rank {rank} is at {location}" for rank, location in busy.items()]
        if not descriptions:
            descriptions = ["all ranks wait for each other"] + [
                f"rank {rank} at {location}" for rank, (_, _, location) in others.items()
            ]
        return f"Rank {self._rank} has waited for {seconds:.0f} s: {'; '.join(descriptions)}."


_ADVICE = (
    "The log of that rank may show the reason (exit code -9 usually means that the process ran out of memory). Add "
    "--resume to continue from the last checkpoint."
)


def _stack_location(thread: int) -> tuple[bool, str, tuple[tuple[str, int, str], ...] | None]:
    """Return whether a thread waits for other ranks, its location as text, and its stack."""
    frame, stack = sys._current_frames().get(thread), []
    while frame is not None:
        stack.append((frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name))
        frame = frame.f_back
    if not stack:
        return False, "its end", None
    waits = any(part in stack[0][0].replace(os.sep, "/") for part in _WAITING_PATHS)
    shown_location = next(
        (location for location in stack if "/torch/" not in location[0].replace(os.sep, "/")), stack[0]
    )
    file, line, name = shown_location if waits else stack[0]
    return waits, f"{os.sep.join(file.split(os.sep)[-2:])}:{line} in {name}", tuple(stack)
