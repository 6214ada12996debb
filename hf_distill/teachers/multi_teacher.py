"""`MultiTeacher`: several teachers, each of which teaches all target tokens."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from ..core.logits import DenseLogits, LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..core.teacher_kinds import incompatible_teachers
from ..core.teacher_logits import MultiTeacherLogits
from ..data.teacher_column import check_no_teacher_column
from ..errors import did_you_mean, raise_if_any
from ..losses.objective import Term
from .base import JointStep, Teacher
from .frozen import FrozenTeacher
from .group import TeacherGroup, find_trained_teacher


class MultiTeacher(TeacherGroup):
    """Several teachers, each with a share of the soft loss (multi-teacher distillation).

    L = alpha * sum over teachers of share * T^2 * divergence(teacher || student) + (1 - alpha) * cross entropy
        + further losses, each with the teacher that its option `teacher` names, or with the first teacher

    Metrics that compare with a teacher (KL, top-1 agreement, the teacher's perplexity) use the first teacher.

    Args:
        teachers: name -> a `Teacher`, a model, or the path or id of a model; two or more.
        weights: name -> weight above 0; the weights are normalized to shares, and a missing weight counts 1.

    Raises:
        DistillError: names or weights are wrong, or the teachers cannot be combined; the message lists all problems.
    """

    def __init__(self, teachers: Mapping[str, Any], weights: Mapping[str, float] | None = None):
        super().__init__(
            {
                name: teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
                for name, teacher in teachers.items()
            }
        )
        weights = dict(weights or {})
        names = [name for name, teacher in self.teachers.items() if teacher.provides_soft_labels]
        raise_if_any(
            _validate(self.teachers, weights, names)
            + incompatible_teachers({name: teacher.kind for name, teacher in self.teachers.items()})
        )
        total = sum(weights.get(name, 1.0) for name in names)
        self.shares = {name: weights.get(name, 1.0) / total for name in names}
        self.provides_soft_labels = bool(names)

    def check_data(self, rows: Any, name: str) -> None:
        """Check the data for every teacher.

        Raises:
            DistillError: a row names its teacher; or one of the teachers cannot read the data.
        """
        check_no_teacher_column(rows, [*self.teachers], name, "pass teacher=RoutedTeacher({...}) to route them")
        super().check_data(rows, name)

    def numbers_to_read(self, inputs: dict, shift: bool) -> dict[str, Tensor]:
        """Return the integers that any of the teachers needs; those of the same name are the same."""
        return {name: number for teacher in self for name, number in teacher.numbers_to_read(inputs, shift).items()}

    def start_batch(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> None:
        """Announce a batch to every teacher that starts early."""
        for name, teacher in self.teachers.items():
            if teacher.prefetch:
                teacher.start_batch(inputs, targets, _requests_for(name, feature_requests))

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> Signals:
        """Call every teacher."""
        return _merge_signals(
            {
                name: teacher(inputs, targets, _requests_for(name, feature_requests))
                for name, teacher in self.teachers.items()
            }
        )

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, FeatureTokens],
        num_items: Tensor | int | None,
        terms: Sequence[Term],
    ) -> JointStep | None:
        """Return the step of the teacher that is trained, joined with the signals of the others; None: none is."""
        trained, signals = find_trained_teacher(self), dict[str, Signals]()
        if trained is None:
            return None
        for name, teacher in self.teachers.items():
            requests = _requests_for(name, feature_requests)
            if teacher is trained:
                trained_step = trained.joint_step(inputs, targets, requests, num_items, terms)
            else:
                signals[name] = teacher(inputs, targets, requests)

        def merge(trained_signals: Signals) -> Signals:
            return _merge_signals({name: signals.get(name, trained_signals) for name in self.teachers})

        return _CombinedStep(trained_step, merge)


class _CombinedStep(JointStep):
    """The step of the trained teacher, whose signals are merged with those of the other teachers."""

    def __init__(self, trained_step: JointStep, merge: Callable[[Signals], Signals]):
        self.trained_step, self.merge = trained_step, merge

    def context(self, student: nn.Module) -> AbstractContextManager:
        return self.trained_step.context(student)

    def __call__(self, student_logits: LazyLogits | DenseLogits) -> Tensor:
        loss = self.trained_step(student_logits)
        self.teacher_signals = self.merge(self.trained_step.teacher_signals)
        self.per_token = self.trained_step.per_token
        return loss


def _requests_for(name: str, feature_requests: Mapping[FeatureKey, FeatureTokens]) -> dict[FeatureKey, FeatureTokens]:
    """Return the requests for the features of one teacher."""
    return {key: tokens for key, tokens in feature_requests.items() if key.teacher == name}


def _merge_signals(by_teacher: Mapping[str, Signals]) -> Signals:
    """Merge the signals of several teachers; a teacher without logits contributes its features only."""
    sources: dict[str, Any] = {name: each.logits for name, each in by_teacher.items() if each.logits is not None}
    features = {key: feature for each in by_teacher.values() for key, feature in each.features.items()}
    return Signals(MultiTeacherLogits(sources) if sources else None, features)


def _validate(teachers: Mapping[str, Teacher], weights: Mapping[str, float], with_soft_labels: list[str]) -> list[str]:
    """Return the problems of the names and weights."""
    problems = [
        f"a teacher has the name {name!r}, which is a part of names in logs: use letters, digits and _ only"
        for name in teachers
        if not str(name).isidentifier()
    ]
    if len(teachers) < 2:
        problems.append(f"`teachers` has {len(teachers)} entries: give two or more, or pass a single one as `teacher`")
    nested = [name for name, teacher in teachers.items() if isinstance(teacher, MultiTeacher)]
    problems += [
        f"{name} is itself a MultiTeacher: give all of its teachers by name in `teachers` instead" for name in nested
    ]
    for name, weight in weights.items():
        if name not in teachers:
            problems.append(
                f"a weight is given for {name!r}, and there is no such teacher{did_you_mean(name, teachers)}"
            )
        elif name not in with_soft_labels:
            problems.append(f"{name} has a weight, but gives no soft labels that it could weight: leave its weight out")
        elif not 0 < weight < math.inf:
            problems.append(f"{name} has the weight {weight!r}; it must be a finite number above 0")
    return problems
