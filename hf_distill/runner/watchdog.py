"""A watchdog for distributed runs: it names ranks that died or hang, and ends the ranks that wait for them."""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeAlias

import torch
from torch.distributed import distributed_c10d
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from ..core.processes import is_alone
from ..errors import RunError

_HEARTBEAT_SECONDS = 1.0  # interval of heartbeats
_SILENT_SECONDS = 5.0  # without a heartbeat for this long, a rank counts as dead
_FAILED_KEY, _RECEIVED_KEY = "hf_distill-failed", "hf_distill-received"  # keys in the store of torch.distributed
_STACKS_KEY = "hf_distill-stacks"  # in the store once a rank reports a hang; `-RANK` holds the stack of a rank
_SHOWN_FRAMES = 15  # of each rank in a report
_Stack: TypeAlias = tuple[tuple[str, int, str], ...]  # file, line and function of each frame, the innermost first
_WAITING_PATHS = (
    "/torch/distributed/",
    "/torch/nn/parallel/distributed.py",
    "/torch/autograd/graph.py",
    "/deepspeed/comm/",
)  # code in which a rank waits for others


class HangWatchdog(TrainerCallback):
    """Watches the ranks of a run from a thread in each process, which sends heartbeats with the current location.

    A rank waits if its stack does not change and either the innermost frame is in `torch.distributed`, or it is inside
    a training step or evaluation that does not go on. The latter is how a rank waits on a GPU: a collective of NCCL
    returns at once, and the host waits where it next reads a number of the device, in any function. Compilation and
    generation change the stack; saving a checkpoint and loading models are not inside a step.

    If a rank has waited for 90 % of the timeout, or if a collective fails, the error names the ranks that are at
    another line or send no heartbeats. If a rank fails, the other ranks end with its message.

    Args:
        timeout: Seconds that a process may wait in a collective (`ddp_timeout`).
    """

    def __init__(self, timeout: float):
        self._timeout_seconds = 0.9 * timeout  # earlier than the timeout of the collective, which names no rank
        self._num_events = self._heartbeats = 0
        self._phase = ""  # what goes on only with an event: a step or an evaluation; "" while a rank may take its time
        self._num_batches = 0  # of the evaluation
        self._over = threading.Event()
        self._failure: str | None = None  # of another process

    def _record_event(self, phase: str = "") -> None:
        self._phase = phase
        self._num_events += 1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The data set is prepared, or read up to the step of a checkpoint, before the first step."""
        self._record_event()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A step begins; its data are loaded."""
        self._record_event(f"step {state.global_step + 1}")

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The step goes on."""
        self._record_event(self._phase)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """A log, an evaluation, a checkpoint or the data of the next step may follow."""
        self._record_event()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: object,
    ) -> None:
        """The evaluation goes on; after its last batch the metrics are computed."""
        self._num_batches += 1
        is_last = has_length(eval_dataloader) and self._num_batches >= len(eval_dataloader)
        self._record_event("" if is_last else f"the evaluation after step {state.global_step}")
        self._num_batches = 0 if is_last else self._num_batches

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """The evaluation ended."""
        self._num_batches = 0
        self._record_event()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watch the ranks while the block runs. A single process is not watched.

        Raises:
            RunError: A collective failed because a rank died. The message names the rank.
        """
        if is_alone():
            yield
            return
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        default_store: Any = distributed_c10d._get_default_store()
        self._store = default_store.clone()  # the thread needs a separate connection
        self._main = threading.get_ident()
        if self._rank == 0:  # an earlier run of these processes may have failed
            for key in (_FAILED_KEY, _RECEIVED_KEY, _STACKS_KEY):
                self._store.delete_key(key)
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
            self._send_stack_if_requested()
            self._send_heartbeat(waits, location)
            self._exit_if_another_rank_failed()
            now = self._waiting_state(waits, stack)
            if now is None or now != before:
                before, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout_seconds:
                report = self._describe_hang(time.monotonic() - since, location)
                sys.stderr.write(f"Error: {report} {_ADVICE}\n{self._describe_stacks()}")
                sys.stderr.flush()
                os._exit(1)  # an exception cannot interrupt a collective in the main thread

    def _waiting_state(self, waits: bool, stack: _Stack | None) -> tuple[int, _Stack | None] | None:
        """Return what does not change while a rank waits; None if it does not wait.

        Args:
            waits: whether the innermost frame of the main thread is in code that waits for other ranks.
            stack: the stack of the main thread.
        """
        return (self._num_events, stack) if waits or self._phase else None

    def _send_heartbeat(self, waits: bool, location: str) -> None:
        self._heartbeats += 1
        where = f"{location} ({self._phase})" if self._phase else location
        try:
            self._store.set(f"hf_distill-{self._rank}", json.dumps([self._heartbeats, waits, where]))
        except RuntimeError:  # the process of the store ended, so the collectives fail too
            self._over.set()

    def _send_stack_if_requested(self) -> None:
        """Write the stack of the main thread to the store, if a rank that reports a hang has requested it."""
        with suppress(RuntimeError):
            if self._store.check([_STACKS_KEY]):
                self._store.set(f"{_STACKS_KEY}-{self._rank}", _format_stack(self._main))

    def _describe_stacks(self) -> str:
        """Return the stacks of all ranks that sent one."""
        text = f"Stack of rank {self._rank}:\n{_format_stack(self._main)}"
        with suppress(RuntimeError):
            for rank in range(self._world):
                if rank != self._rank and self._store.check([key := f"{_STACKS_KEY}-{rank}"]):
                    text += f"Stack of rank {rank}:\n{self._store.get(key).decode()}"
        return text

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

    def _describe_hang(self, seconds: float, location: str) -> str:
        where = f"{location} ({self._phase})" if self._phase else location
        try:
            self._store.set(_STACKS_KEY, "")
            silent, others = self._find_silent_ranks()
        except RuntimeError:
            return "Rank 0, which hosts the store of the process group, has ended."
        waiting = {rank for rank, (_, waits, at) in others.items() if waits or at == where}
        descriptions = [f"rank {rank} sends no heartbeat (last seen at {at})" for rank, at in silent.items()]
        descriptions += [
            f"rank {rank} is at {at}"
            for rank, (_, _, at) in others.items()
            if rank not in silent and rank not in waiting
        ]
        if not descriptions:
            descriptions = ["all ranks wait for each other"] + [
                f"rank {rank} at {at}" for rank, (_, _, at) in others.items()
            ]
        return (
            f"Rank {self._rank} has waited for {seconds:.0f} s at {where}: {'; '.join(descriptions)}. If a rank only "
            "needs longer, such as rank 0 for preparing the data, raise train.ddp_timeout."
        )


_ADVICE = (
    "The log of that rank may show the reason (exit code -9 usually means that the process ran out of memory). Add "
    "--resume to continue from the last checkpoint."
)


def _format_stack(thread: int) -> str:
    """Return the innermost frames of a thread as Python prints them."""
    frame = sys._current_frames().get(thread)
    return "".join(traceback.format_stack(frame, limit=None)[-_SHOWN_FRAMES:]) if frame is not None else ""


def _stack_location(thread: int) -> tuple[bool, str, _Stack | None]:
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
