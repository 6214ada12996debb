"""Records of published log-probabilities, and the checks that hold for every format.

Shape letters: S tokens and P positions of a record, K stored ids of a position, T target tokens, k ids that are kept.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

from ...core.files import FileEntry
from ...core.json_types import JSON
from ...errors import DistillError

_ROUNDING = 1e-3  # by which a sum of probabilities, or a log-probability, may exceed its bound
_MAX_APPROXIMATE_SUM = 2.0  # of probabilities that were approximated; a larger one shows that they are no probabilities

Location: TypeAlias = tuple[int, ...]  # of a record in its file; the format defines the numbers


@dataclass(frozen=True)
class TokenRecord:
    """The most probable ids at the positions of one text.

    where:          file and line or row, for errors
    tokens:         [S] token ids of the text
    ids:            [P, K] ids at each position, S - 1 <= P <= S; -1 in padding slots
    log_probs:      [P, K] their log-probabilities after tokens[: position + 1], at temperature 1; -inf in padding slots
    min_k, max_k:   bounds of the number of most probable ids that every position has. They differ if the file does not
                    show whether the id of the text is one of them or was added.
    is_approximate: whether the format approximates log-probabilities, so that probabilities may sum to more than 1
    model:          name of the model in the file, or None
    """

    where: str
    tokens: np.ndarray
    ids: np.ndarray
    log_probs: np.ndarray
    min_k: int
    max_k: int
    is_approximate: bool = False
    model: str | None = None


@dataclass(frozen=True)
class Provenance:
    """The source of log-probabilities, for the manifest.

    format:  vllm or distillkit
    files:   entry of each file
    details: further facts of the format
    """

    format: str
    files: list[FileEntry]
    details: dict[str, JSON] = field(default_factory=dict)


class RecordFile(Protocol):
    """A file, or a folder, of records."""

    def provenance(self) -> Provenance:
        """Return the format and the entries of the files."""

    def records(self) -> Iterator[tuple[Location, TokenRecord]]:
        """Yield all records with their locations.

        Raises:
            DistillError: a record is malformed; the message names its line or row.
        """

    def read(self, location: Location) -> TokenRecord:
        """Return the record at a location."""


def check_record(record: TokenRecord, vocab_size: int) -> None:
    """Check that a record holds log-probabilities of a vocabulary.

    Args:
        record: the record.
        vocab_size: V of the teacher.

    Raises:
        DistillError: lengths differ, an id is out of range or occurs twice, or a value is no log-probability.
    """
    tokens, ids, log_probs = record.tokens, record.ids, record.log_probs
    if not len(tokens) - 1 <= len(ids) <= len(tokens):
        raise DistillError(
            f"{record.where} has log-probabilities of {len(ids)} positions and {len(tokens)} tokens. A text of "
            f"{len(tokens)} tokens needs {len(tokens) - 1}, or {len(tokens)} with those after its last token."
        )
    for name, values in (("token", tokens[:, None]), ("id", ids)):
        wrong = (values >= vocab_size) | (values < -1 if name == "id" else values < 0)
        if position := _first(wrong):
            raise DistillError(
                f"{record.where} has the {name} {values[position]} at position {position[0]}, and the teacher's "
                f"vocabulary has the ids 0 to {vocab_size - 1}. Use the recipe of a student with the teacher's "
                "tokenizer; if the teacher predicts more ids than that, pass --vocab-size."
            )
    is_filled = ids >= 0
    ordered = np.sort(ids, axis=1)
    if position := _first((np.diff(ordered, axis=1) == 0) & (ordered[:, 1:] >= 0)):
        raise DistillError(f"{record.where} has an id twice at position {position[0]}.")
    upper = np.inf if record.is_approximate else _ROUNDING
    if position := _first(is_filled & ~(np.isfinite(log_probs) & (log_probs <= upper))):
        raise DistillError(
            f"{record.where} has the value {log_probs[position]:g} at position {position[0]}, and a log-probability is "
            "finite and at most 0. Logits cannot be imported: export log-probabilities."
        )
    sums = probability_sums(record)
    if position := _first(sums[:, None] > (_MAX_APPROXIMATE_SUM if record.is_approximate else 1 + _ROUNDING)):
        raise DistillError(
            f"In {record.where} the probabilities of position {position[0]} sum to {sums[position[0]]:.4g}, which is "
            "above 1. The values must be log-probabilities at temperature 1 over all ids, not logits, and not "
            "normalized over the stored ids after a rounding."
        )


def probability_sums(record: TokenRecord) -> np.ndarray:
    """Return the sum of the stored probabilities of each position, [P]."""
    with np.errstate(over="ignore"):
        return np.exp(record.log_probs).sum(axis=1)


def top_k(record: TokenRecord, positions: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k most probable ids of some positions.

    Approximate probabilities that sum to more than 1 are divided by their sum.

    Args:
        record: a record that passed `check_record`, with max_k >= k.
        positions: [T] positions.
        k: number of ids.

    Returns:
        ids [T, k], ascending, and log-probabilities [T, k], at most 0.
    """
    ids, log_probs = record.ids[positions], record.log_probs[positions]
    if record.is_approximate:
        log_probs = log_probs - np.log(np.maximum(probability_sums(record)[positions], 1.0))[:, None]
    best = np.argsort(-log_probs, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(best, np.argsort(np.take_along_axis(ids, best, 1), axis=1), 1)
    return np.take_along_axis(ids, best, 1), np.minimum(np.take_along_axis(log_probs, best, 1), 0.0)


def _first(mask: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first true element, or an empty tuple."""
    return tuple(int(i) for i in np.argwhere(mask)[0]) if mask.any() else ()
