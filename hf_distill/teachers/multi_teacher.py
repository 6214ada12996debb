"""Several teachers at once, by name."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from ..core.logits import DenseLogits, LazyLogits, MultiTeacherLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..core.teacher_kinds import incompatible_teachers
from ..errors import DistillError, did_you_mean, raise_if_any
from ..losses.objective import Term
from .base import JointStep, Teacher
from .frozen import FrozenTeacher
from .trainable import TrainableTeacher


class MultiTeacher(Teacher):
    """Several teachers, each with its share of the soft term (multi-teacher distillation).

    L = alpha * sum over teachers of share * T^2 * divergence(teacher || student) + (1 - alpha) * cross entropy
        + further losses, each with the teacher that it names, else with the first

    Statistics (KL, agreement, the teacher's perplexity) compare with the first teacher.

    Args:
        teachers: name -> a `Teacher`, a model, or the path or id of one; two or more.
        weights: name -> weight, normalised to shares; those left out count 1.

    Raises:
        DistillError: names or weights that are wrong, or teachers that make no sense together; all of it at once.
    """

    def __init__(self, teachers: Mapping[str, Any], weights: Mapping[str, float] | None = None):
        self.teachers: dict[str, Teacher] = {
            name: teacher if isinstance(teacher, Teacher) else FrozenTeacher(teacher)
            for name, teacher in teachers.items()
        }
        given, spoken = (
            dict(weights or {}),
            [name for name, teacher in self.teachers.items() if teacher.provides_soft_labels],
        )
        raise_if_any(
            _validate(self.teachers, given, spoken)
            + incompatible_teachers({n: t.kind for n, t in self.teachers.items()})
        )
        total = sum(given.get(name, 1.0) for name in spoken)
        self.shares = {name: given.get(name, 1.0) / total for name in spoken}
        self.provides_soft_labels, self._progress = bool(spoken), 0.0
        self.tied_to_student = any(teacher.tied_to_student for teacher in self)
        self._trained = next((teacher for teacher in self if isinstance(teacher, TrainableTeacher)), None)

    def __iter__(self) -> Iterator[Teacher]:
        return iter(self.teachers.values())

    @property
    def progress(self) -> float:
        """Of the training; each of them is told."""
        return self._progress

    @progress.setter
    def progress(self, value: float) -> None:
        self._progress = value
        for teacher in self:
            teacher.progress = value

    def get_teacher(self, name: str | None) -> Teacher:
        """The teacher of that name; without one the first that has soft labels."""
        if name is None:
            return self.teachers[next(iter(self.shares or self.teachers))]
        if name not in self.shares:
            raise DistillError(
                f"A loss names the teacher {name!r}, which is none of {', '.join(self.shares) or 'those that tell'}"
                f"{did_you_mean(name, self.shares)}"
            )
        return self.teachers[name]

    def input_names(self) -> frozenset[str]:
        """What any of their models accepts."""
        return frozenset().union(*(teacher.input_names() for teacher in self))

    def prepare(self, student: nn.Module, device: torch.device, processing_class: Any = None) -> None:
        """Prepare each; `model` is the first one's, `trained` and its options those of the one that is trained."""
        for teacher in self:
            teacher.prepare(student, device, processing_class)
        self.model = next(iter(self)).model
        if self._trained is not None:
            self.trainable_module, self.optimizer_overrides = (
                self._trained.trainable_module,
                self._trained.optimizer_overrides,
            )

    def check_data(self, rows: Any, name: str) -> None:
        """Each refuses what it cannot read."""
        for teacher in self:
            teacher.check_data(rows, name)

    def check_arguments(self, args: TrainingArguments) -> list[str]:
        """What any of them says."""
        problems = [
            f"{name}: {why}" for name, teacher in self.teachers.items() for why in teacher.check_arguments(args)
        ]
        self.max_grad_norm = self._trained.max_grad_norm if self._trained else None
        return problems

    def adapt_objective(self, terms: Sequence[Term]) -> list[Term]:
        """The soft term becomes `soft_NAME` of each, with its share of the weight."""
        soft, hard, *others = terms
        for name, teacher in self.teachers.items():
            teacher.adapt_objective([replace(soft, weight=soft.weight * self.shares.get(name, 0.0)), hard])
        self.terms = self._trained.terms if self._trained else ()
        for term in others:
            self.get_teacher(term.teacher)
        apart = [
            replace(soft, name=f"soft_{name}", teacher=name, weight=soft.weight * share)
            for name, share in self.shares.items()
        ]
        first = next(iter(self.shares), None)
        others = [replace(t, teacher=first) if t.loss.needs and t.teacher is None else t for t in others]
        return [*apart, hard, *(term for term in others if self.provides_soft_labels or not term.loss.needs)]

    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """What any of them says: a view that one of them gives the student is compared with all teachers."""
        return [
            f"{name}: {why}" for name, teacher in self.teachers.items() for why in teacher.incompatible_terms(terms)
        ]

    def forward(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """What each of them says."""
        return _merge_signals(
            {n: t(inputs, targets, _requests_for(n, feature_requests)) for n, t in self.teachers.items()}
        )

    def joint_step(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, Targets],
        num_items: Tensor | int | None,
    ) -> JointStep | None:
        """The one that is trained, and what the others say."""
        runs = {
            n: t.joint_step(inputs, targets, _requests_for(n, feature_requests), num_items)
            for n, t in self.teachers.items()
        }
        run = next((run for run in runs.values() if run is not None), None)
        if run is None:
            return None
        others = {
            n: t(inputs, targets, _requests_for(n, feature_requests))
            for n, t in self.teachers.items()
            if runs[n] is None
        }
        return _CombinedStep(run, lambda told: _merge_signals({n: others.get(n, told) for n in self.teachers}))

    def transform_student_batch(self, inputs: dict, targets: Targets, training: bool) -> tuple[dict, Targets]:
        """What the student sees where one of them gives it a view."""
        for teacher in self:
            inputs, targets = teacher.transform_student_batch(inputs, targets, training)
        return inputs, targets

    def on_train_begin(self, step: int) -> None:
        """Each begins."""
        for teacher in self:
            teacher.on_train_begin(step)

    def on_step_end(self, step: int, updated: bool) -> None:
        """Each moves, if it does."""
        for teacher in self:
            teacher.on_step_end(step, updated)

    def metrics(self) -> dict[str, float]:
        """What each says, with its name behind: `teacher_weight_drift_NAME`."""
        return {f"{key}_{name}": value for name, t in self.teachers.items() for key, value in t.metrics().items()}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Each into a folder of its own in the checkpoint."""
        for name, teacher in self.teachers.items():
            teacher.save(str(Path(folder) / "teachers" / name), rank, write)

    def load(self, folder: str, rank: int) -> None:
        """Each from its folder."""
        for name, teacher in self.teachers.items():
            teacher.load(str(Path(folder) / "teachers" / name), rank)


class _CombinedStep(JointStep):
    """A run of the one that is trained, whose answer is told among those of the others."""

    def __init__(self, run: JointStep, together: Callable[[Signals], Signals]):
        self.run, self.together = run, together

    def context(self, student: nn.Module) -> AbstractContextManager:
        return self.run.context(student)

    def __call__(self, said: LazyLogits | DenseLogits) -> Tensor:
        loss = self.run(said)
        self.teacher_signals, self.per_token = self.together(self.run.teacher_signals), self.run.per_token
        return loss


def _requests_for(name: str, feature_requests: Mapping[FeatureKey, Targets]) -> dict[FeatureKey, Targets]:
    return {key: tokens for key, tokens in feature_requests.items() if key.teacher == name}


def _merge_signals(told: Mapping[str, Signals]) -> Signals:
    """Signals of several teachers as one; who says nothing about the asked tokens is left out."""
    sources: dict[str, Any] = {name: signals.logits for name, signals in told.items() if signals.logits is not None}
    features = {key: feature for signals in told.values() for key, feature in signals.features.items()}
    return Signals(MultiTeacherLogits(sources) if sources else None, features)


def _validate(teachers: Mapping[str, Teacher], weights: Mapping[str, float], spoken: list[str]) -> list[str]:
    """What is wrong with names and weights."""
    problems = [
        f"a teacher is called {name!r}: logs and losses carry its name, so letters, digits and _ only"
        for name in teachers
        if not str(name).isidentifier()
    ]
    if len(teachers) < 2:
        problems.append(f"there are {len(teachers)} teachers by name: give two or more, or one as `teacher`")
    nested = [name for name, teacher in teachers.items() if isinstance(teacher, MultiTeacher)]
    problems += [f"{name} is several teachers itself: name all of them side by side" for name in nested]
    for name, weight in weights.items():
        if name not in teachers:
            problems.append(f"there is no teacher {name!r} to weigh{did_you_mean(name, teachers)}")
        elif name not in spoken:
            problems.append(f"{name} has a weight, but no soft labels to weigh: leave its weight out")
        elif not 0 < weight < math.inf:
            problems.append(f"{name} has the weight {weight!r}; it must be above 0")
    return problems
