"""`GracefulShutdown`: SIGTERM and Ctrl-C end training with a checkpoint, from which it resumes exactly."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import RunInterrupted

if TYPE_CHECKING:
    from transformers import Trainer

logger = logging.get_logger(__name__)
# A launcher forwards Ctrl-C to processes that already got it from the terminal; a repeat within this time is ignored.
_REPEAT_SECONDS = 1.0


class GracefulShutdown(TrainerCallback):
    """A callback for trainers that ends training on SIGTERM or SIGINT, within the context manager `installed`.

    `hf-distill run` and `run_recipe` use one for all trainers of a run; a `DistillTrainer` with `stop_on_signal=True`
    uses one for each training.

    After the first signal, training ends when the current step is complete, with its evaluation and checkpoint. Outside
    of training the process ends at once, because a resumed run repeats those parts. A second SIGINT always ends the
    process at once.

    Args:
        log: called with a message for the user.
        how_to_resume: what to do to resume from a checkpoint, for the messages; it follows "To continue, ".
    """

    def __init__(self, log: Callable[[str], None], how_to_resume: str = "run it again with --resume"):
        self._log, self._how_to_resume = log, how_to_resume
        self._received_signal = 0  # the signal that this process received; 0 if there was none
        self._signal = 0  # the signal on which all processes stop
        self._received_at = 0.0  # seconds, monotonic
        self._is_training = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals while the context is active; outside of the main thread this does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._received_signal:
            if number == signal.SIGINT and time.monotonic() - self._received_at > _REPEAT_SECONDS:
                _end_process()
            return
        self._received_signal, self._received_at = number, time.monotonic()
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C works even if Python code does not run
        if not self._is_training:
            self._signal = number
            self._stop(f"outside of training. To continue, {self._how_to_resume}")
        again = " Press Ctrl-C again to end it at once." if number == signal.SIGINT else ""
        self._log(f"{signal.Signals(number).name}: training saves a checkpoint and stops after this step.{again}")

    def _stop(self, message: str) -> None:
        self._log(f"Stopped by {signal.Signals(self._signal).name} {message}.")
        raise RunInterrupted(128 + self._signal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From now on, a signal is handled at the end of the step."""
        self._is_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Request a checkpoint on all processes if one of them received a signal.

        Raises:
            RunInterrupted: `save_strategy` is "no", so there is no checkpoint to wait for.
        """
        self._signal = self._received_signal
        if args.world_size > 1:
            received = torch.full((), self._received_signal, device=args.device)  # written by the device, no copy
            torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
            self._signal = int(received)
        if self._signal and args.save_strategy == "no":
            step = f"after step {state.global_step} of {state.max_steps}"
            self._stop(f'{step}. No checkpoint was saved, because save_strategy is "no"')
        control.should_save |= bool(self._signal)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Stop now that the checkpoint is complete.

        Raises:
            RunInterrupted: a process received a signal.
        """
        if self._signal:
            step = state.global_step
            saved = f"checkpoint-{step} is complete"
            self._stop(f"after step {step} of {state.max_steps}; {saved}. To continue, {self._how_to_resume}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """From now on, a signal is handled at once."""
        self._is_training = False


@contextmanager
def stop_on_signal(trainer: "Trainer") -> Iterator[None]:
    """End a training in this context on SIGTERM or SIGINT, with a checkpoint."""
    shutdown = GracefulShutdown(logger.warning, how_to_resume="call train(resume_from_checkpoint=True)")
    trainer.add_callback(shutdown)
    try:
        with shutdown.installed():
            yield
    finally:
        trainer.remove_callback(shutdown)


def _end_process() -> None:
    """End the process with the default action of SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
