"""`TeacherFailureGuard`: ends training on all ranks with a checkpoint if a teacher's server fails."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from ..errors import RunError
from .checkpoints import latest_complete


class TeacherFailureGuard:
    """Saves a checkpoint of the last complete step when a teacher fails, from which training resumes exactly.

    A teacher that runs on a server can fail in the middle of a step. The weights are those of the last complete step
    then, but the random generators have advanced: `remember` keeps their states at the end of each step, and `end`
    restores them before the checkpoint is written.

    Attributes:
        failure: the error of the teacher, after `agree` raised it.
    """

    def __init__(self) -> None:
        self.failure: RunError | None = None
        self.reset()

    def reset(self) -> None:
        """Start with no complete step; called before a training."""
        self._random_states: _RandomStates | None = None
        self._saved_step: int | None = None  # step of the last checkpoint of this training

    def checkpoint_was_saved(self, step: int) -> None:
        """Record that a checkpoint of a step was written."""
        self._saved_step = step

    def agree(self, failure: RunError | None, accelerator: Accelerator) -> None:
        """Raise an error on all ranks if the teacher failed on one of them; every rank calls this for each batch.

        Args:
            failure: the error of this rank, or None.
            accelerator: that of the training.

        Raises:
            RunError: the teacher failed on a rank.
        """
        if accelerator.num_processes > 1:
            failed = torch.full((1,), failure is not None, dtype=torch.float32, device=accelerator.device)
            if not bool(accelerator.reduce(failed, "sum")):
                return
            texts = gather_object([None if failure is None else str(failure)])
            rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
            failure = failure or RunError(f"The teacher of rank {rank} failed: {text}")
        if failure is not None:
            self.failure = failure
            raise failure

    def remember(self) -> None:
        """Keep the states of the random generators; called when a step is complete."""
        self._random_states = _RandomStates()

    def end(self, folder: Path, args: TrainingArguments, state: TrainerState, save: Callable[[], None]) -> RunError:
        """Write a checkpoint of the last complete step, unless there is one, and return the error to raise.

        Args:
            folder: the folder of the checkpoints.
            args: the training arguments.
            state: the state of the training.
            save: writes a checkpoint.
        """
        saves, step = args.save_strategy != SaveStrategy.NO, state.global_step
        if saves and self._random_states is not None and self._saved_step != step:
            self._random_states.restore()
            save()
        checkpoint = latest_complete(folder)
        if checkpoint is not None:
            action = f"{checkpoint} is complete: resume from it when the server answers"
        elif saves:
            action = "No step was complete, so there is no checkpoint: start again when the server answers"
        else:
            action = 'No checkpoint was saved, because save_strategy is "no"'
        reason = str(self.failure).rstrip(".")
        return RunError(f"Training stops after step {step} of {state.max_steps}. {reason}. {action}.")


class _RandomStates:
    """The states of the random generators that a checkpoint of transformers contains."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
