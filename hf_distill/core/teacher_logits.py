"""The logits of teachers: of one of any kind, of several for the same tokens, or of several for different tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from .aligned_logits import AlignedLogits, CrossTokenizerLogits
from .logits import DenseLogits, LazyLogits, SparseLogProbs

OneTeacherLogits: TypeAlias = DenseLogits | LazyLogits | SparseLogProbs | CrossTokenizerLogits | AlignedLogits


@dataclass(frozen=True)
class MultiTeacherLogits:
    """The logits of several teachers for the same target tokens, by their names; `Term.teacher` selects one."""

    by_teacher: Mapping[str, OneTeacherLogits]


@dataclass(frozen=True)
class RoutedLogits:
    """The logits of several teachers, each for some of the target tokens.

    by_teacher:        name -> logits of the teacher's T_k target tokens; teachers without target tokens are left out
    tokens_by_teacher: name -> [T_k] their indices among the T target tokens of the batch
    other_tokens:      [T_0] indices of the target tokens without a teacher
    any_full_logits:   whether a teacher returns logits of all ids, with or without target tokens in this batch
    """

    by_teacher: Mapping[str, OneTeacherLogits]
    tokens_by_teacher: Mapping[str, Tensor]
    other_tokens: Tensor
    any_full_logits: bool


TeacherLogits: TypeAlias = OneTeacherLogits | MultiTeacherLogits | RoutedLogits


def logits_by_teacher(source: TeacherLogits | None) -> dict[str | None, OneTeacherLogits]:
    """Return the logits of all teachers by name; the name of a single teacher is None."""
    if isinstance(source, MultiTeacherLogits | RoutedLogits):
        return dict(source.by_teacher.items())
    return {} if source is None else {None: source}
