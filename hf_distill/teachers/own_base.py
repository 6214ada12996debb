"""The student's own base as the teacher: no second model in memory."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..blocks import Stack, stack_of
from ..errors import DistillError, need
from ..forward import teacher_signals
from ..signals import Signals, Tap, Targets
from .base import Teacher


class OwnBaseTeacher(Teacher):
    """A student with adapters learns from itself with the adapters switched off.

    It learns its task from the hard labels while the soft ones keep it near the model that it was: the teacher is the
    base in eval mode, and costs its forward but no memory.
    """

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Find the student's adapters.

        Raises:
            DistillError: it has none.
        """
        need("peft", "peft", "A teacher that is the student's own base")
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self.model = student
        self._adapters: Any = [m for m in student.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        if not self._adapters:
            raise DistillError(
                f"The student, a {type(student).__name__}, has no adapters that could be switched off: wrap it by "
                "peft.get_peft_model, set student.lora in a recipe, or use a FrozenTeacher of the same weights."
            )

    def stack(self, which: str | None = None) -> Stack:
        """The student's blocks."""
        return stack_of(self.model, which)

    @torch.no_grad()
    def __call__(self, inputs: dict, targets: Targets, wanted: Mapping[Tap, Targets]) -> Signals:
        """One forward of the base."""
        training = self.model.training
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.model.eval()
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            return teacher_signals(self.model, inputs, targets, wanted)
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)
            self.model.requires_grad_(False).train(training)
            for p in trained:
                p.requires_grad_(True)
