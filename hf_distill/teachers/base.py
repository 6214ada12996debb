"""The interface of a teacher, and the only base class that a user plugs into."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..blocks import Stack
from ..errors import DistillError
from ..signals import Signals, Tap, Targets


class Teacher(ABC):
    """Something that says, for the asked tokens of a batch, what it would predict."""

    model: Any = None

    @abstractmethod
    def __call__(self, inputs: dict, targets: Targets, wanted: Mapping[Tap, Targets]) -> Signals:
        """Answer a batch, without gradient.

        Args:
            inputs: the collator's batch, [B, S] tensors on the student's device.
            targets: the asked tokens.
            wanted: features to tell, with their tokens; empty where `stack` raises.

        Returns:
            signals whose logits are [T, V_t], with a feature for each tap.
        """

    def stack(self, which: str | None = None) -> Stack:
        """The blocks whose features it can tell; see `blocks.stack_of`.

        Raises:
            DistillError: it tells logits alone.
        """
        raise DistillError(
            f"A {type(self).__name__} tells logits and no features: leave the losses on hidden states and attention "
            "out, or use a FrozenTeacher."
        )

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:  # noqa: B027
        """Be ready for calls; called once, before the first of them.

        Args:
            student: the student, unwrapped.
            device: where the student runs.
            processing_class: the student's tokenizer, if the trainer has one.

        Raises:
            DistillError: this teacher cannot teach this student.
        """

    def after_step(self, step: int, progress: float) -> None:  # noqa: B027
        """Move, if it does: called after each step of the optimizer, never between micro-batches.

        Args:
            step: of the optimizer, counted from 1.
            progress: of the training, in [0, 1].
        """

    def metrics(self) -> dict[str, float]:
        """What training logs say of it."""
        return {}

    def save(self, folder: str, rank: int, write: bool) -> None:  # noqa: B027
        """Write into a checkpoint what a resumed run needs of it; called on every rank.

        Args:
            folder: of the checkpoint.
            rank: of this process.
            write: whether this rank writes what all ranks have.
        """

    def load(self, folder: str, rank: int) -> None:  # noqa: B027
        """Read what `save` wrote; called before the first step of a resumed run."""
