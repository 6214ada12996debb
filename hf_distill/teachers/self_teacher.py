"""What teachers have in common that are the student itself, in another state: no second model in memory."""

from abc import abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager

from ..core.signals import FeatureKey, Signals, Targets
from ..models.blocks import LayerStack, get_layer_stack
from ..models.forward import extract_signals, measure_output_head
from ..models.module_state import eval_mode
from .base import Teacher


class SelfTeacher(Teacher):
    """The student in eval mode and in a state that classes which derive say; `prepare` sets `model` to it."""

    tied_to_student = True

    @abstractmethod
    def teacher_mode(self) -> AbstractContextManager[None]:
        """While it lasts, the student is the teacher."""

    def layer_stack(self, which: str | None = None) -> LayerStack:
        """The student's blocks."""
        return get_layer_stack(self.model, which)

    def __call__(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """One forward of the student as the teacher."""
        measure_output_head(self.model, inputs)
        with eval_mode(self.model), self.teacher_mode():
            return self._told(extract_signals(self.model, inputs, targets, feature_requests))

    def _told(self, signals: Signals) -> Signals:
        """What is handed on of what was said, while the state lasts."""
        return signals
