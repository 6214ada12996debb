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
from ..core.signals import FeatureKey, Signals, Targets
from ..core.teacher_kinds import incompatible_teachers
from ..errors import DistillError, did_you_mean, raise_if_any
from ..losses.objective import Term
from .base import Beside, Teacher
from .frozen import FrozenTeacher
from .trained import TrainedTeacher


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
        given, spoken = dict(weights or {}), [name for name, teacher in self.teachers.items() if teacher.soft]
        raise_if_any(
            _named_wrongly(self.teachers, given, spoken)
            + incompatible_teachers({n: t.kind for n, t in self.teachers.items()})
        )
        total = sum(given.get(name, 1.0) for name in spoken)
        self.shares = {name: given.get(name, 1.0) / total for name in spoken}
        self.soft, self._progress = bool(spoken), 0.0
        self.bound = any(teacher.bound for teacher in self)
        self._trained = next((teacher for teacher in self if isinstance(teacher, TrainedTeacher)), None)

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

    def named(self, name: str | None) -> Teacher:
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
            self.trained, self.options = self._trained.trained, self._trained.options

    def check_data(self, rows: Any, name: str) -> None:
        """Each refuses what it cannot read."""
        for teacher in self:
            teacher.check_data(rows, name)

    def unfit(self, args: TrainingArguments) -> list[str]:
        """What any of them says."""
        problems = [f"{name}: {why}" for name, teacher in self.teachers.items() for why in teacher.unfit(args)]
        self.clipped = self._trained.clipped if self._trained else None
        return problems

    def learn(self, terms: Sequence[Term]) -> list[Term]:
        """The soft term becomes `soft_NAME` of each, with its share of the weight."""
        soft, hard, *others = terms
        for name, teacher in self.teachers.items():
            teacher.learn([replace(soft, weight=soft.weight * self.shares.get(name, 0.0)), hard])
        self.terms = self._trained.terms if self._trained else ()
        for term in others:
            self.named(term.teacher)
        apart = [
            replace(soft, name=f"soft_{name}", teacher=name, weight=soft.weight * share)
            for name, share in self.shares.items()
        ]
        first = next(iter(self.shares), None)
        others = [replace(t, teacher=first) if t.loss.needs and t.teacher is None else t for t in others]
        return [*apart, hard, *(term for term in others if self.soft or not term.loss.needs)]

    def incompatible_terms(self, terms: Sequence[Term]) -> list[str]:
        """What any of them says: a view that one of them gives the student is compared with all teachers."""
        return [
            f"{name}: {why}" for name, teacher in self.teachers.items() for why in teacher.incompatible_terms(terms)
        ]

    def __call__(self, inputs: dict, targets: Targets, feature_requests: Mapping[FeatureKey, Targets]) -> Signals:
        """What each of them says."""
        return _together({n: t(inputs, targets, _of(n, feature_requests)) for n, t in self.teachers.items()})

    def beside(
        self,
        inputs: dict,
        targets: Targets,
        feature_requests: Mapping[FeatureKey, Targets],
        num_items: Tensor | int | None,
    ) -> Beside | None:
        """The one that is trained, and what the others say."""
        runs = {n: t.beside(inputs, targets, _of(n, feature_requests), num_items) for n, t in self.teachers.items()}
        run = next((run for run in runs.values() if run is not None), None)
        if run is None:
            return None
        others = {n: t(inputs, targets, _of(n, feature_requests)) for n, t in self.teachers.items() if runs[n] is None}
        return _Among(run, lambda told: _together({n: others.get(n, told) for n in self.teachers}))

    def seen(self, inputs: dict, targets: Targets, training: bool) -> tuple[dict, Targets]:
        """What the student sees where one of them gives it a view."""
        for teacher in self:
            inputs, targets = teacher.seen(inputs, targets, training)
        return inputs, targets

    def begin(self, step: int) -> None:
        """Each begins."""
        for teacher in self:
            teacher.begin(step)

    def after_step(self, step: int, updated: bool) -> None:
        """Each moves, if it does."""
        for teacher in self:
            teacher.after_step(step, updated)

    def metrics(self) -> dict[str, float]:
        """What each says, with its name behind: `teacher_distance_NAME`."""
        return {f"{key}_{name}": value for name, t in self.teachers.items() for key, value in t.metrics().items()}

    def save(self, folder: str, rank: int, write: bool) -> None:
        """Each into a folder of its own in the checkpoint."""
        for name, teacher in self.teachers.items():
            teacher.save(str(Path(folder) / "teachers" / name), rank, write)

    def load(self, folder: str, rank: int) -> None:
        """Each from its folder."""
        for name, teacher in self.teachers.items():
            teacher.load(str(Path(folder) / "teachers" / name), rank)


class _Among(Beside):
    """A run of the one that is trained, whose answer is told among those of the others."""

    def __init__(self, run: Beside, together: Callable[[Signals], Signals]):
        self.run, self.together = run, together

    def around(self, student: nn.Module) -> AbstractContextManager:
        return self.run.around(student)

    def __call__(self, said: LazyLogits | DenseLogits) -> Tensor:
        loss = self.run(said)
        self.told, self.per_token = self.together(self.run.told), self.run.per_token
        return loss


def _of(name: str, feature_requests: Mapping[FeatureKey, Targets]) -> dict[FeatureKey, Targets]:
    return {key: tokens for key, tokens in feature_requests.items() if key.teacher == name}


def _together(told: Mapping[str, Signals]) -> Signals:
    """Signals of several teachers as one; who says nothing about the asked tokens is left out."""
    sources: dict[str, Any] = {name: signals.logits for name, signals in told.items() if signals.logits is not None}
    features = {key: feature for signals in told.values() for key, feature in signals.features.items()}
    return Signals(MultiTeacherLogits(sources) if sources else None, features)


def _named_wrongly(teachers: Mapping[str, Teacher], weights: Mapping[str, float], spoken: list[str]) -> list[str]:
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
