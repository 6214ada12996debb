"""Makes the rows that a teacher with another tokenizer reads, and aligns them with the student's rows."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.aligned_inputs import aligned_keys
from ...errors import DistillError
from .chunks import align, number_chunks, renumber
from .flat_tokens import FlatTokens
from .retokenization import Retokenized, Retokenizer
from .target_runs import align_target_runs
from .text_encoder import TextEncoder
from .tokenizer_text import tokenizer_pair


class TeacherRowMaker:
    """Adds the rows of a teacher with another tokenizer to batches, and the chunks that align both sides.

    It can be pickled, so that the workers of a data loader run it.

    Args:
        student_tokenizer: a fast tokenizer of transformers, or a processor with one.
        teacher_tokenizer: likewise.
        max_length: the most tokens of a document that the teacher reads; None: all.
        name: name of the teacher if there are several, see `aligned_keys`.

    Raises:
        DistillError: the text of the tokens of one tokenizer cannot be mapped to bytes.
    """

    def __init__(
        self, student_tokenizer: Any, teacher_tokenizer: Any, max_length: int | None = None, name: str | None = None
    ):
        self.student, self.teacher = tokenizer_pair(student_tokenizer, teacher_tokenizer)
        self.max_length, self.name = max_length, name
        teacher = getattr(teacher_tokenizer, "tokenizer", teacher_tokenizer)
        self._retokenize = Retokenizer(self.student, self.teacher, TextEncoder(teacher, self.teacher.rules))
        pad_ids = (teacher.pad_token_id, teacher.eos_token_id, 0)
        self.pad_token_id: int = next(i for i in pad_ids if i is not None)

    @property
    def replaced_keys(self) -> tuple[str, ...]:
        """Keys of a batch that are of no use once the teacher's rows are made."""
        return (f"teacher_labels{self._suffix}",)

    @property
    def _suffix(self) -> str:
        return "" if self.name is None else f"_{self.name}"

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the teacher's rows and the chunks of both sides, see `AlignedKeys`.

        If the batch has `teacher_input_ids` and `teacher_labels`, which were rendered with the teacher's own chat
        template, the target tokens of both sides are aligned, and the teacher reads each row up to the last of them.
        Otherwise, and for rows without tokens of the teacher, the text of the student's tokens is tokenized for the
        teacher.

        A chunk is numbered if all its tokens of the student are target tokens, none of its tokens is the first of its
        document, which no token predicts, and the teacher reads all its tokens.

        Args:
            batch: a collated batch on the CPU: `input_ids` and `labels` [B, S], and `attention_mask` [B, S] if rows are
                padded, or `position_ids` [1, S] if they are packed.

        Raises:
            DistillError: the batch has no labels, or the teacher's rows are not those of the student.
        """
        student = FlatTokens.of_batch(batch)
        if f"teacher_labels{self._suffix}" not in batch:
            teacher, chunks = self._made_rows(student)
            return self._batch(student, teacher, *chunks)
        teacher = self._given_rows(batch, student)
        chunks = align_target_runs(student, teacher, self.student.table, self.teacher.table)
        teacher, teacher_chunks = _up_to_last_chunk(teacher, chunks[1])
        is_made = ~np.isin(student.rows, teacher.rows)
        if not is_made.any():
            return self._batch(student, teacher, chunks[0], teacher_chunks)
        retokenized, retokenized_chunks = self._made_rows(student.select(is_made))
        student_chunks = chunks[0].copy()
        student_chunks[is_made] = retokenized_chunks[0] + (retokenized_chunks[0] > 0) * chunks[0].max()
        retokenized_chunks = retokenized_chunks[1] + (retokenized_chunks[1] > 0) * chunks[0].max()
        teacher, order = teacher.merge(retokenized)
        of_both = _in_order(student_chunks, np.concatenate([teacher_chunks, retokenized_chunks])[order])
        return self._batch(student, teacher, *of_both)

    def _given_rows(self, batch: Mapping[str, Any], student: FlatTokens) -> FlatTokens:
        teacher = FlatTokens.of_batch(batch, "teacher_", self._suffix)
        if teacher.shape[0] != student.shape[0] or student.is_packed:
            raise DistillError(
                f"The batch has {student.shape[0]} rows{' of packed documents' * student.is_packed} and "
                f"{teacher.shape[0]} rows that were made for the teacher: each row needs one of the teacher. Turn "
                "packing off."
            )
        return teacher

    def _made_rows(self, student: FlatTokens) -> tuple[FlatTokens, tuple[np.ndarray, np.ndarray]]:
        retokenized = self._retokenize(student)
        chunks = (number_chunks if retokenized.is_same_text else align)(retokenized.student, retokenized.teacher)
        if retokenized.student_skip.any() or retokenized.teacher_skip.any():
            chunks = renumber(*chunks, _has_equal_prefix(retokenized, *chunks))
        student_chunks, teacher_chunks = np.zeros(len(student.ids), np.int64), np.zeros(len(retokenized.ids), np.int64)
        student_chunks[retokenized.student_indices], teacher_chunks[retokenized.teacher_indices] = chunks
        return student.with_tokens(retokenized.ids, retokenized.documents), (student_chunks, teacher_chunks)

    def _batch(
        self, student: FlatTokens, teacher: FlatTokens, student_chunks: np.ndarray, teacher_chunks: np.ndarray
    ) -> dict[str, Tensor]:
        places = teacher.places()
        is_read = np.ones(len(places), bool) if self.max_length is None else places < self.max_length
        is_matched = ~self.teacher.table.is_unmatched[self.teacher.table.rows(teacher.ids)]
        is_usable = np.ones(1 + max(student_chunks.max(initial=0), teacher_chunks.max(initial=0)), bool)
        is_usable[0] = False
        is_usable[student_chunks[student.is_first | ~student.is_target]] = False
        is_usable[teacher_chunks[teacher.is_first | ~is_read | ~is_matched]] = False
        for chunks in (student_chunks, teacher_chunks):
            is_usable &= np.bincount(chunks, minlength=len(is_usable)) > 0
        student_chunks, teacher_chunks = renumber(student_chunks, teacher_chunks, is_usable)

        keys = aligned_keys(self.name)
        columns = {keys.teacher_input_ids: teacher.ids, keys.teacher_chunk_ids: teacher_chunks}
        result = {keys.chunk_ids: student.scatter(student_chunks)}
        if student.is_packed:
            columns[keys.teacher_position_ids] = places
            result |= {key: values[is_read][None] for key, values in columns.items()}
        else:
            columns[keys.teacher_attention_mask] = np.ones_like(places)
            fill = {keys.teacher_input_ids: self.pad_token_id}
            width = max(1, int(places[is_read].max(initial=0)) + 1)
            for key, values in columns.items():
                rows = np.full((student.shape[0], width), fill.get(key, 0), dtype=np.int64)
                rows[teacher.rows[is_read], places[is_read]] = values[is_read]
                result[key] = rows
            result[keys.teacher_attention_mask][:, 0] = 1  # attention over no token at all is not a number
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in result.items()}


def _has_equal_prefix(retokenized: Retokenized, student_chunks: np.ndarray, teacher_chunks: np.ndarray) -> np.ndarray:
    """Return whether the tokens of a chunk start with the same space on both sides, [C + 1].

    Where one tokenizer puts a space before a text, its first token (" Hello") is not the text of the other side.
    """
    count = 1 + int(max(student_chunks.max(initial=0), teacher_chunks.max(initial=0)))
    student, teacher = (
        np.bincount(chunks, weights=skip, minlength=count)
        for chunks, skip in ((student_chunks, retokenized.student_skip), (teacher_chunks, retokenized.teacher_skip))
    )
    is_equal: np.ndarray = student == teacher
    is_equal[0] = False
    return is_equal


def _up_to_last_chunk(tokens: FlatTokens, chunks: np.ndarray) -> tuple[FlatTokens, np.ndarray]:
    """Return the tokens of each row up to the last one in a chunk, or the first one, and their chunks."""
    last = np.zeros(tokens.shape[0], np.int64)
    index = np.arange(len(chunks))
    is_end = tokens.is_first | (chunks > 0)
    np.maximum.at(last, tokens.rows[is_end], index[is_end])
    is_kept = index <= last[tokens.rows]
    return tokens.select(is_kept), chunks[is_kept]


def _in_order(student_chunks: np.ndarray, teacher_chunks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return chunks numbered from 1 in the order of the student's tokens."""
    numbers, first = np.unique(student_chunks[student_chunks > 0], return_index=True)
    new = np.zeros(1 + max(student_chunks.max(initial=0), teacher_chunks.max(initial=0)), np.int64)
    new[numbers[np.argsort(first)]] = 1 + np.arange(len(numbers))
    return new[student_chunks], new[teacher_chunks]
