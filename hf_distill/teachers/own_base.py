"""The student's own base as the teacher: no second model in memory."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import DistillError, need
from .itself import ItselfTeacher


class OwnBaseTeacher(ItselfTeacher):
    """A student with adapters learns from itself with the adapters switched off.

    It learns its task from the hard labels while the soft ones keep it near the model that it was: the teacher is the
    base in eval mode, and costs its forward but no memory.
    """

    kind = "own_base"

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

    @contextmanager
    def other_state(self) -> Iterator[None]:
        """The adapters are off."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)
            self.model.requires_grad_(False)
            for p in trained:
                p.requires_grad_(True)
