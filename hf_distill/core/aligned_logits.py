"""What a teacher of another tokenizer predicts: of spans of text that both tokenizers delimit, instead of tokens.

A chunk is a smallest span of the text at whose start and end both the student's and the teacher's tokens have a
boundary. Shape letters: those of `targets.py`, and
    C chunks of a batch · T_t target tokens of the teacher, all of which are in chunks
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .logits import DenseLogits, LazyLogits, SparseLogProbs, take_rows
from .token_classes import TokenClasses

TeacherTokenLogits = DenseLogits | LazyLogits | SparseLogProbs


@dataclass(frozen=True)
class AlignedLogits:
    """The chunks of T target tokens of the student, and what the teacher predicts of them; losses on chunks read it.

    first_logits:   the teacher's logits of the first token of each chunk, C rows: both models predict what follows the
                    same text. None if no loss reads them
    log_probs:      [C] log-probability of each chunk's text, the sum over its tokens of the teacher; NaN if the teacher
                    does not know it. None if no loss reads them
    chunks:         [T] chunk of each target token of the student, counted from 0; -1 if it is in none
    first_tokens:   [C] index among the T target tokens of the first one of each chunk
    token_classes:  classes over which the distributions of both models are compared
    chunks_on_host: [T] the same as `chunks`
    chunk_bytes:    [C] number of bytes of the text of each chunk, for statistics; None if unknown
    """

    first_logits: TeacherTokenLogits | None
    log_probs: Tensor | None
    chunks: Tensor
    first_tokens: Tensor
    token_classes: TokenClasses
    chunks_on_host: np.ndarray
    chunk_bytes: Tensor | None = None

    def __len__(self) -> int:
        return len(self.first_tokens)

    @property
    def vocab_size(self) -> int | None:
        """V of the teacher; None if no loss reads its logits."""
        return None if self.first_logits is None else self.first_logits.vocab_size

    def chunk_range(self, rows: slice) -> slice:
        """Return the chunks of some target tokens, which must be all tokens of these chunks."""
        chunks = self.chunks_on_host[rows]
        chunks = chunks[chunks >= 0]
        return slice(int(chunks[0]), int(chunks[-1]) + 1) if len(chunks) else slice(0, 0)

    def slice(self, rows: slice) -> "AlignedLogits":
        """Return the chunks of consecutive target tokens, which must be all tokens of these chunks."""
        start, stop, _ = rows.indices(len(self.chunks_on_host))
        chunks = self.chunk_range(rows)
        first_logits = None if self.first_logits is None else take_rows(self.first_logits, chunks)
        log_probs = None if self.log_probs is None else self.log_probs[chunks]
        of_rows, on_host = self.chunks[start:stop], self.chunks_on_host[start:stop]
        return AlignedLogits(
            first_logits,
            log_probs,
            (of_rows - chunks.start).clamp(min=-1),
            self.first_tokens[chunks] - start,
            self.token_classes,
            np.maximum(on_host - chunks.start, -1),
            None if self.chunk_bytes is None else self.chunk_bytes[chunks],
        )


@dataclass(frozen=True)
class CrossTokenizerLogits:
    """The logits of a teacher of another tokenizer, of its own target tokens, and the chunks of both models' tokens.

    logits:          of the T_t target tokens of the teacher
    labels:          [T_t] ids of the teacher
    teacher_chunks:  [T_t] chunk of each target token of the teacher, counted from 0 in the order of the student's
    teacher_first_tokens: [C] index among the T_t tokens of the first one of each chunk
    chunks, first_tokens, token_classes, chunks_on_host, chunk_bytes: see `AlignedLogits`
    """

    logits: TeacherTokenLogits
    labels: Tensor
    teacher_chunks: Tensor
    teacher_first_tokens: Tensor
    chunks: Tensor
    first_tokens: Tensor
    token_classes: TokenClasses
    chunks_on_host: np.ndarray
    chunk_bytes: Tensor | None = None

    @property
    def vocab_size(self) -> int | None:
        """V of the teacher."""
        return self.logits.vocab_size

    def aligned(self, needs_first_logits: bool, needs_log_probs: bool, max_rows: int) -> AlignedLogits:
        """Return the chunks with what the losses read.

        Args:
            needs_first_logits: whether a loss reads `first_logits`.
            needs_log_probs: whether a loss reads `log_probs`.
            max_rows: largest number of rows of logits to materialize at a time.
        """
        first_logits = take_rows(self.logits, self.teacher_first_tokens) if needs_first_logits else None
        log_probs = None
        if needs_log_probs:
            of_tokens = label_log_probs(self.logits, self.labels, max_rows)
            log_probs = of_tokens.new_zeros(len(self.first_tokens)).index_add(0, self.teacher_chunks, of_tokens)
        return AlignedLogits(
            first_logits,
            log_probs,
            self.chunks,
            self.first_tokens,
            self.token_classes,
            self.chunks_on_host,
            self.chunk_bytes,
        )


def label_log_probs(logits: TeacherTokenLogits, labels: Tensor, max_rows: int) -> Tensor:
    """Return the log-probabilities of the labels, [T].

    Args:
        logits: of T tokens. A label that a sparse teacher does not know has the log-probability NaN.
        labels: [T].
        max_rows: largest number of rows of logits to materialize at a time.
    """
    if isinstance(logits, SparseLogProbs):
        is_label = (logits.ids == labels[:, None]) & ~logits.log_probs.isneginf()
        stored = torch.where(is_label.any(1), logits.log_probs.masked_fill(~is_label, 0).sum(1), torch.nan)
        return stored if logits.label_log_probs is None else logits.label_log_probs
    parts = [labels.new_zeros(0, dtype=torch.float32)]
    for start in range(0, len(labels), max_rows):
        rows = slice(start, start + max_rows)
        values = logits.project(rows)
        parts.append(values.gather(1, labels[rows, None])[:, 0] - values.logsumexp(1))
    return torch.cat(parts[1:] or parts)


def aligned_only(teachers: Mapping[str | None, object]) -> list[AlignedLogits]:
    """Return the chunks of those teachers that have another tokenizer."""
    return [teacher for teacher in teachers.values() if isinstance(teacher, AlignedLogits)]


def cut_rows(num_tokens: int, size: int, teachers: Iterable[AlignedLogits]) -> list[slice]:
    """Return ranges of at most `size` tokens that divide no chunk; a longer chunk has a range of its own.

    Args:
        num_tokens: T.
        size: number of tokens of a range, at least 1.
        teachers: the chunks of the T tokens for each teacher.
    """
    is_cut = np.ones(num_tokens + 1, dtype=bool)
    for teacher in teachers:
        chunks = teacher.chunks_on_host
        is_cut[1:-1] &= (chunks[1:] != chunks[:-1]) | (chunks[1:] < 0)
    if is_cut.all():
        ends = [*range(0, num_tokens, size), num_tokens]
        return [slice(start, end) for start, end in pairwise(ends)]
    cuts, ranges, start = np.flatnonzero(is_cut), [], 0
    while start < num_tokens:
        index = int(np.searchsorted(cuts, start + size, side="right")) - 1
        end = int(cuts[index]) if cuts[index] > start else int(cuts[index + 1])
        ranges.append(slice(start, end))
        start = end
    return ranges
