"""Alignment of two tokenizations of the same text: the smallest spans at whose ends both have a boundary.

Letters: N tokens of a side (N_s of the student, N_t of the teacher) · C chunks · n bytes
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class TokenSpans:
    """The tokens of one side, in order.

    data:     [n] bytes of the tokens, uint8
    lengths:  [N] number of bytes of each token
    starts:   [N] where each token starts, in coordinates that both sides share; never decreases
    ends:     [N] where it ends
    """

    data: np.ndarray
    lengths: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @classmethod
    def of_text(cls, data: np.ndarray, ends: np.ndarray) -> "TokenSpans":
        """Return spans whose coordinates are the bytes of the tokens themselves.

        Args:
            data: [n] uint8.
            ends: [N] where each token ends in it.
        """
        lengths = np.diff(ends, prepend=0)
        return cls(data, lengths, ends - lengths, ends)


def align(student: TokenSpans, teacher: TokenSpans) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunk of each token of the student [N_s] and of the teacher [N_t], from 1; 0 is none.

    A token without text belongs to the chunk after it. Spans whose texts differ are no chunks.

    Args:
        student: tokens in coordinates of both sides, see `share_coordinates`.
        teacher: likewise.
    """
    chunks = number_chunks(student, teacher)
    return renumber(*chunks, has_equal_text(student, teacher, *chunks))


def number_chunks(student: TokenSpans, teacher: TokenSpans) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunk of each token, [N_s] and [N_t], from the boundaries that both sides have.

    The texts of both sides are not compared, see `has_equal_text`.
    """
    last = max((int(side.ends[-1]) for side in (student, teacher) if len(side.ends)), default=0)
    is_boundary = np.zeros((2, last + 1), dtype=bool)
    for mask, side in zip(is_boundary, (student, teacher), strict=True):
        mask[side.starts] = mask[side.ends] = True
    boundaries = np.cumsum(is_boundary[0] & is_boundary[1])  # number of common boundaries up to each coordinate
    student_chunks, teacher_chunks = boundaries[student.starts], boundaries[teacher.starts]
    count = boundaries[-1]  # tokens after the last boundary are in no chunk
    return np.where(student_chunks < count, student_chunks, 0), np.where(teacher_chunks < count, teacher_chunks, 0)


def has_equal_text(
    student: TokenSpans, teacher: TokenSpans, student_chunks: np.ndarray, teacher_chunks: np.ndarray
) -> np.ndarray:
    """Return whether the two sides of each chunk have the same text, [C + 1]; element 0, no chunk, is false.

    Texts with the same Unicode normalization NFC are the same text.
    """
    count = 1 + max((int(chunks.max()) for chunks in (student_chunks, teacher_chunks) if len(chunks)), default=0)
    data, chunk_of_byte, sizes = [], [], []
    for side, chunks in ((student, student_chunks), (teacher, teacher_chunks)):
        of_byte = np.repeat(chunks, side.lengths)
        data.append(side.data[of_byte > 0])
        chunk_of_byte.append(of_byte[of_byte > 0])
        sizes.append(np.bincount(chunk_of_byte[-1], minlength=count))
    is_equal = (sizes[0] == sizes[1]) & (sizes[0] > 0)
    compared = [bytes_[is_equal[of_byte]] for bytes_, of_byte in zip(data, chunk_of_byte, strict=True)]
    chunk_of_compared = chunk_of_byte[0][is_equal[chunk_of_byte[0]]]
    is_equal[chunk_of_compared[compared[0] != compared[1]]] = False
    ends = [np.cumsum(each) for each in sizes]
    for chunk in np.flatnonzero(~is_equal & (sizes[0] > 0) & (sizes[1] > 0)):
        texts = [bytes_[end[chunk - 1] : end[chunk]].tobytes() for bytes_, end in zip(data, ends, strict=True)]
        is_equal[chunk] = _is_canonically_equal(*texts)
    return is_equal


def renumber(
    student_chunks: np.ndarray, teacher_chunks: np.ndarray, is_kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the chunks of the tokens, numbered from 1 without those that are not kept.

    Args:
        student_chunks: [N_s].
        teacher_chunks: [N_t].
        is_kept: [C + 1] whether a chunk is kept; element 0 is false.
    """
    numbers = np.where(is_kept, np.cumsum(is_kept), 0)
    return numbers[student_chunks], numbers[teacher_chunks]


def share_coordinates(student: TokenSpans, teacher: TokenSpans) -> tuple[TokenSpans, TokenSpans]:
    """Return the spans of two different texts in coordinates in which their common start and end coincide.

    The coordinates are those of the common start, the rest of the student, the rest of the teacher, and the common end.
    """
    start = common_prefix_length(student.data, teacher.data)
    end = common_prefix_length(student.data[start:][::-1], teacher.data[start:][::-1])
    student_rest, teacher_rest = (len(side.data) - start - end for side in (student, teacher))
    return (
        _move(student, start, start + student_rest, rest_by=0, end_by=teacher_rest),
        _move(teacher, start, start + teacher_rest, rest_by=student_rest, end_by=student_rest),
    )


def _move(side: TokenSpans, rest: int, end: int, rest_by: int, end_by: int) -> TokenSpans:
    """Move what lies between `rest` and `end`, and what lies after `end`.

    If there is nothing between, a token that ends there stays and the token that starts there moves.
    """
    ends = np.where(side.ends <= rest, 0, np.where(side.ends < end, rest_by, end_by))
    starts = np.where(side.starts >= end, end_by, np.where(side.starts <= rest, 0, rest_by))
    return replace(side, starts=side.starts + starts, ends=side.ends + ends)


def common_prefix_length(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of leading bytes that two texts have in common."""
    size = min(len(one), len(other))
    different = one[:size] != other[:size]
    return int(different.argmax()) if different.any() else size


def concatenate(sides: Sequence[TokenSpans], starts: Sequence[int] | np.ndarray) -> TokenSpans:
    """Return the tokens of several texts as one side.

    Args:
        sides: the tokens of each text.
        starts: coordinate at which each text starts.
    """
    if not sides:
        return TokenSpans.of_text(np.zeros(0, np.uint8), np.zeros(0, np.int64))
    return TokenSpans(
        np.concatenate([side.data for side in sides]),
        np.concatenate([side.lengths for side in sides]),
        np.concatenate([side.starts + start for side, start in zip(sides, starts, strict=True)]),
        np.concatenate([side.ends + start for side, start in zip(sides, starts, strict=True)]),
    )


def _is_canonically_equal(one: bytes, other: bytes) -> bool:
    try:
        texts = one.decode(), other.decode()
    except UnicodeDecodeError:
        return False
    return unicodedata.normalize("NFC", texts[0]) == unicodedata.normalize("NFC", texts[1])
