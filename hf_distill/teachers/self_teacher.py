"""What teachers have in common that are the student itself, in another state: no second model in memory."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from ..core.signals import Signals, Tap, Targets
from ..models.blocks import Stack, stack_of
from ..models.forward import measure_output_head, teacher_signals
from ..models.module_state import eval_mode
from .base import Teacher


class ItselfTeacher(Teacher):
    """The student in eval mode and in a state that classes which derive say; `prepare` sets `model` to it."""

    bound = True

    @abstractmethod
    def other_state(self) -> AbstractContextManager[None]:
        """While it lasts, the student is the teacher."""

    def stack(self, which: str | None = None) -> Stack:
        """The student's blocks."""
        return stack_of(self.model, which)

    def __call__(self, inputs: dict, targets: Targets, wanted: Mapping[Tap, Targets]) -> Signals:
        """One forward of the student as the teacher."""
        measure_output_head(self.model, inputs)
        with eval_mode(self.model), self.other_state():
            return self._told(teacher_signals(self.model, inputs, targets, wanted))

    def _told(self, signals: Signals) -> Signals:
        """What is handed on of what was said, while the state lasts."""
        return signals
