"""`TeacherGroup`: the base class of teachers that consist of several named teachers."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import DistillError
from .base import OtherTokens, Teacher
from .trainable import TrainableTeacher


class TeacherGroup(Teacher):
    """Several teachers by name; hooks are passed on to each of them.

    Args:
        teachers: name -> teacher.
    """

    def __init__(self, teachers: Mapping[str, Teacher]):
        self.teachers: dict[str, Teacher] = dict(teachers)
        self._progress = 0.0
        self.tied_to_student = any(teacher.tied_to_student for teacher in self)
        self.can_fail = any(teacher.can_fail for teacher in self)
        self.prefetch = max((teacher.prefetch for teacher in self), default=0)
        self.max_wait_seconds = sum(teacher.max_wait_seconds for teacher in self)
        self.has_full_logits = any(teacher.has_full_logits for teacher in self)

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers.values())

    @property
    def progress(self) -> float:
        """Progress of the training, in [0, 1]; setting it sets that of every teacher."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = value
        for teacher in self:
            teacher.progress = value

    def input_names(self) -> frozenset[str]:
        """Names of the inputs that any of the teachers accepts."""
        return frozenset().union(*(teacher.input_names() for teacher in self))

    def readable_inputs(self) -> frozenset[str] | None:
        """Names of the inputs that any of the teachers reads; None: any."""
        names = [teacher.readable_inputs() for teacher in self]
        return None if None in names else frozenset().union(*(each or () for each in names))

    def add_inputs(self, inputs: dict) -> dict:
        """Return a batch with what only the teachers read."""
        for teacher in self:
            inputs = teacher.add_inputs(inputs)
        return inputs

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Prepare every teacher; `model` is that of the first."""
        for teacher in self:
            teacher.prepare(student, device, processing_class)
        self.model = next(iter(self)).model
        self.context_length = self._context_length()
        self.other_tokens = self._other_tokens()

    def _other_tokens(self) -> OtherTokens | None:
        """Return the tokens of the teachers if none of them can read the student's.

        Raises:
            DistillError: some read the student's tokens, or have different tokenizers; all of them read one batch.
        """
        tokens = {name: teacher.other_tokens for name, teacher in self.teachers.items()}
        different = {name: each for name, each in tokens.items() if each is not None}
        if not different:
            return None
        if len(different) < len(tokens) or len({each.fingerprint for each in different.values()}) > 1:
            raise DistillError(
                f"The teachers {', '.join(different)} have another tokenizer than the student, and the teachers "
                f"{', '.join(tokens)} read the same inputs: use teachers that have one tokenizer."
            )
        return next(iter(different.values()))

    def _context_length(self) -> int | None:
        """Return the limit of the teacher that reads the shortest rows; None if no limit is known."""
        limits = [teacher.context_length for teacher in self if teacher.context_length is not None]
        return min(limits, default=None)

    def check_data(self, rows: Any, name: str) -> None:
        """Check a data set with every teacher."""
        for teacher in self:
            teacher.check_data(rows, name)

    def on_train_begin(self, step: int) -> None:
        """Call the hook of every teacher."""
        for teacher in self:
            teacher.on_train_begin(step)

    def on_step_end(self, step: int, updated: bool) -> None:
        """Call the hook of every teacher."""
        for teacher in self:
            teacher.on_step_end(step, updated)

    def close(self) -> None:
        """Cancel what any of the teachers runs in the background."""
        for teacher in self:
            teacher.close()

    def metrics(self) -> dict[str, float]:
        """Return the metrics of every teacher with its name appended: `teacher_weight_drift_NAME`."""
        return {
            f"{key}_{name}": value
            for name, teacher in self.teachers.items()
            for key, value in teacher.metrics().items()
        }

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Write the state of every teacher into the folder `teachers/NAME` of the checkpoint."""
        for name, teacher in self.teachers.items():
            teacher.save(str(Path(folder) / "teachers" / name), rank, write)

    def load(self, folder: str, rank: int) -> None:
        """Read the state of every teacher from its folder."""
        for name, teacher in self.teachers.items():
            teacher.load(str(Path(folder) / "teachers" / name), rank)


def teachers_by_name(teacher: Teacher) -> Mapping[str | None, Teacher]:
    """Return the teachers of a group by name, and any other teacher under the name None, without wrappers."""
    teachers = dict(teacher.teachers.items()) if isinstance(teacher, TeacherGroup) else {None: teacher}
    return {name: one.unwrapped for name, one in teachers.items()}


def find_trained_teacher(teacher: Teacher) -> TrainableTeacher | None:
    """Return the teacher that is trained with the student: the teacher or one of several; None if there is none."""
    return next((member for member in teachers_by_name(teacher).values() if isinstance(member, TrainableTeacher)), None)
