"""SIGTERM and Ctrl-C: training ends with a checkpoint of the step that it is in, from which it goes on exactly."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

from ..errors import RunInterrupted

_ECHO = 1.0  # seconds: a launcher hands Ctrl-C on to processes that the terminal has told already


class GracefulShutdown(TrainerCallback):
    """A callback for trainers, and a context manager (`installed`) within which signals are taken.

    `hf-distill run` and `run_recipe` use it for all trainers of a run, a `DistillTrainer` with `stop_on_signal=True`
    for one training.

    The first signal is heeded at the end of the step, with whatever evaluation and checkpoint belong to it; outside of
    training at once, since those parts are done again. A second SIGINT ends the process where it is.

    Args:
        say: is called with a message for the user.
        resume: how to go on from a checkpoint, for the messages.
    """

    def __init__(self, say: Callable[[str], None], resume: str = "--resume goes on"):
        self._say, self._resume = say, resume
        self._asked = self._heeded = 0  # the signal: that came, and that all processes know of
        self._since = 0.0
        self._trains = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """While it lasts, signals are taken; in a thread other than the main one nothing is changed."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, _frame: Any) -> None:
        if self._asked:
            if number == signal.SIGINT and time.monotonic() - self._since > _ECHO:
                _end_here()
            return
        self._asked, self._since = number, time.monotonic()
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second one works wherever the process may be stuck
        if not self._trains:
            self._heeded = number
            self._end("outside of training")
        again = " Ctrl-C again ends it at once." if number == signal.SIGINT else ""
        self._say(f"{signal.Signals(number).name}: saving and stopping after this step.{again}")

    def _end(self, when: str, kept: str | None = None) -> None:
        self._say(f"Stopped by {signal.Signals(self._heeded).name} {when}; {kept or self._resume}.")
        raise RunInterrupted(128 + self._heeded)

    def on_train_begin(self, args, state, control, **kwargs):
        """Steps follow."""
        self._trains = True

    def on_step_end(self, args, state, control, **kwargs):
        """Ask for a checkpoint, on all processes if any of them was told to stop."""
        self._heeded = self._asked
        if args.world_size > 1:
            asked = torch.tensor(self._asked, device=args.device)
            torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
            self._heeded = int(asked)
        if self._heeded and args.save_strategy == "no":
            self._end(f"after step {state.global_step} of {state.max_steps}", "save_strategy is no: nothing is kept")
        control.should_save |= bool(self._heeded)

    def on_save(self, args, state, control, **kwargs):
        """Stop, now that the checkpoint is whole."""
        if self._heeded:
            at = state.global_step
            self._end(f"after step {at} of {state.max_steps}", f"checkpoint-{at} is whole: {self._resume} from it")

    def on_train_end(self, args, state, control, **kwargs):
        """No steps follow."""
        self._trains = False


def _end_here() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
