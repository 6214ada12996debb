"""Aligns the target tokens of conversations that were rendered with the chat templates of both models."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from .chunks import TokenSpans, align, common_prefix_length, concatenate, share_coordinates
from .flat_tokens import FlatTokens
from .token_bytes import TokenBytes


class _Runs:
    """The runs of target tokens of a side: `indices` [n] of their tokens, `bounds` [R + 1] and `rows` [R] of runs."""

    def __init__(self, tokens: FlatTokens, table: TokenBytes):
        self.indices = np.flatnonzero(tokens.is_target)
        is_start = (np.diff(self.indices, prepend=-2) > 1) | (np.diff(tokens.rows[self.indices], prepend=-1) != 0)
        starts = np.flatnonzero(is_start)
        self.rows = tokens.rows[self.indices[starts]]
        self.bounds = np.append(starts, len(self.indices))
        self.data, ends = table.concatenate(table.rows(tokens.ids[self.indices]))
        self.ends = np.append(0, ends)

    def part(self, run: int) -> TokenSpans:
        """Return the tokens of a run."""
        first, last = self.bounds[run : run + 2]
        start, end = self.ends[first], self.ends[last]
        return TokenSpans.of_text(self.data[start:end], self.ends[first + 1 : last + 1] - start)


class _Pair(NamedTuple):
    """Two runs that are aligned: their indices, and their tokens in coordinates of both."""

    student_run: int
    teacher_run: int
    student: TokenSpans
    teacher: TokenSpans


def align_target_runs(
    student: FlatTokens, teacher: FlatTokens, student_table: TokenBytes, teacher_table: TokenBytes
) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunk of each token of the student [N_s] and of the teacher [N_t], from 1; 0 is none.

    The k-th run of target tokens of a row, which is a turn of the assistant, is aligned with the k-th run of the
    teacher's row. Of different texts the common start and end are aligned. If a row has more runs than that of the
    teacher, or fewer, because one is truncated or a template leaves out a turn, its runs are aligned up to the first
    one whose text differs, of which a truncated part is aligned.
    """
    runs = _Runs(student, student_table), _Runs(teacher, teacher_table)
    pairs = list(_pairs(*runs))
    starts = np.cumsum([0, *(1 + max(int(pair.student.ends[-1]), int(pair.teacher.ends[-1])) for pair in pairs)])
    sides = (
        concatenate([pair.student for pair in pairs], starts[:-1]),
        concatenate([pair.teacher for pair in pairs], starts[:-1]),
    )
    chunks = align(*sides)
    return (
        _of_tokens(student, runs[0], [pair.student_run for pair in pairs], chunks[0]),
        _of_tokens(teacher, runs[1], [pair.teacher_run for pair in pairs], chunks[1]),
    )


def _of_tokens(tokens: FlatTokens, side: _Runs, runs: list[int], chunks: np.ndarray) -> np.ndarray:
    """Return the chunk of each token of a batch [N], given those of the tokens of some runs."""
    indices = [side.indices[side.bounds[run] : side.bounds[run + 1]] for run in runs]
    result = np.zeros(len(tokens.ids), np.int64)
    result[np.concatenate([*indices, np.zeros(0, np.int64)])] = chunks
    return result


def _pairs(student: _Runs, teacher: _Runs) -> Iterator[_Pair]:
    """Yield the runs that are aligned."""
    for row in np.unique(student.rows):
        of_both = [np.flatnonzero(side.rows == row) for side in (student, teacher)]
        is_complete = len(of_both[0]) == len(of_both[1])
        for i, j in zip(*of_both, strict=False):
            one, other = student.part(i), teacher.part(j)
            prefix = common_prefix_length(one.data, other.data)
            is_same = prefix == len(one.data) == len(other.data)
            if is_same or is_complete or prefix == min(len(one.data), len(other.data)):
                one, other = (one, other) if is_same else share_coordinates(one, other)
                yield _Pair(int(i), int(j), one, other)
            if not (is_same or is_complete):
                break
