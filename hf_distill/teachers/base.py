"""The interface of a teacher, and the only base class that a user plugs into."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from ..signals import Signals, Targets


class Teacher(ABC):
    """Something that says, for the asked tokens of a batch, what it would predict."""

    model: Any = None

    @abstractmethod
    def __call__(self, inputs: dict, targets: Targets) -> Signals:
        """Answer a batch, without gradient.

        Args:
            inputs: the collator's batch, [B, S] tensors on the student's device.
            targets: the asked tokens.

        Returns:
            signals whose logits are [T, V_t].
        """

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:  # noqa: B027
        """Be ready for calls; called once, before the first of them.

        Args:
            student: the student, unwrapped.
            device: where the student runs.
            processing_class: the student's tokenizer, if the trainer has one.

        Raises:
            DistillError: this teacher cannot teach this student.
        """
