"""Matches records to the rows of a recipe by their token ids."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from ...cache.writer import ShardPlan, load_batch
from ...errors import DistillError
from ...teachers.remote.api import TokenRow
from ...teachers.remote.rows import token_rows
from .records import Location, RecordFile, TokenRecord, check_record, probability_sums, top_k

_SAME_NATS = 0.02  # by which two records of one text may differ: servers do not compute every batch in the same order


@dataclass(frozen=True)
class NeededRow:
    """A row of a recipe whose log-probabilities are needed.

    tokens:    [S] token ids up to the last target token; later ones do not affect its distributions. int32
    positions: [T] ascending positions whose distributions are needed
    """

    tokens: np.ndarray
    positions: np.ndarray


def row_key(row: TokenRow) -> bytes:
    """Return a digest of the token ids of a row up to its last target token."""
    return _digest(np.array(row.ids[: row.positions[-1] + 2], dtype="<i4"))


def _digest(tokens: np.ndarray) -> bytes:
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


class RowIndex:
    """The rows of a recipe that need log-probabilities.

    Args:
        plan: the batches of the cache.
        shift: see `target_labels`.
    """

    def __init__(self, plan: ShardPlan, shift: bool):
        self.rows: dict[bytes, NeededRow] = {}
        for number in range(len(plan.tokens)):
            batch, targets = load_batch(plan, number, torch.device("cpu"), shift)
            for row in token_rows(batch, targets):
                tokens, positions = np.array(row.ids[: row.positions[-1] + 2], dtype="<i4"), np.array(row.positions)
                key = _digest(tokens)
                if key in self.rows:  # the same text, perhaps with other target tokens
                    positions = np.union1d(self.rows[key].positions, positions)
                self.rows[key] = NeededRow(tokens, positions)
        self._lengths = sorted({len(row.tokens) for row in self.rows.values()})

    def matches(self, tokens: np.ndarray) -> list[bytes]:
        """Return the keys of all rows with which a text begins."""
        flat = tokens.astype("<i4").tobytes()
        digest, start, keys = hashlib.blake2b(digest_size=16), 0, []
        for length in self._lengths:
            if length > len(tokens):
                break
            digest.update(flat[start : 4 * length])
            start = 4 * length
            if (key := digest.copy().digest()) in self.rows:
                keys.append(key)
        return keys


@dataclass
class Matches:
    """The records that were found for the rows of a recipe.

    k:          number of ids of each target token
    locations:  key of a row -> (index of the file, location of its record)
    records:    number of records in all files
    unused:     number of records of texts that the recipe does not have
    duplicates: number of records of texts that an earlier record has
    normalized: number of positions whose approximate probabilities sum to more than 1
    models:     names of models in the files
    """

    k: int
    locations: dict[bytes, tuple[int, Location]] = field(default_factory=dict)
    records: int = 0
    unused: int = 0
    duplicates: int = 0
    normalized: int = 0
    models: list[str] = field(default_factory=list)


def match_records(
    files: Sequence[RecordFile],
    index: RowIndex,
    vocab_size: int,
    k: int | None,
    allow_unused: bool,
    on_file: Callable[[int], None] = lambda number: None,
) -> Matches:
    """Check all records, and find that of each row.

    Args:
        files: the files, which are read once.
        index: the rows.
        vocab_size: V of the teacher.
        k: number of ids to keep; None: that of the records, which must all have the same.
        allow_unused: whether records of other texts are skipped; otherwise they are refused.
        on_file: called with the number of each file before it is read.

    Raises:
        DistillError: a record is invalid, belongs to another text, or has too few ids; two records of a text differ.
    """
    found, bounds = Matches(0), _Bounds()
    for number, file in enumerate(files):
        on_file(number)
        for location, record in file.records():
            check_record(record, vocab_size)
            found.records += 1
            keys = index.matches(record.tokens)
            if not keys:
                found.unused += 1
                if not allow_unused:
                    raise DistillError(_unused_message(record, index))
                continue
            bounds.add(record, k)
            if record.model and record.model not in found.models:
                found.models.append(record.model)
            if record.is_approximate:
                found.normalized += int((probability_sums(record) > 1).sum())
            found.duplicates += any(key in found.locations for key in keys)
            for key in keys:
                if key in found.locations:
                    earlier, place = found.locations[key]
                    _check_same(files[earlier].read(place), record, index.rows[key])
                else:
                    found.locations[key] = number, location
    found.k = k or bounds.max_k or 0
    return found


class _Bounds:
    """Bounds of the number of most probable ids that all records have."""

    def __init__(self) -> None:
        self.min_k, self.max_k, self._shortest, self._longest = 0, 0, "", ""

    def add(self, record: TokenRecord, k: int | None) -> None:
        """Narrow the bounds by those of a record.

        Raises:
            DistillError: the record has fewer ids than k, or another number than the earlier records.
        """
        if not len(record.ids):
            return
        if record.max_k < max(k or 1, 1):
            raise DistillError(
                f"{record.where} has a position with {record.max_k} of the most probable ids, and "
                f"{'at least 1 is needed' if k is None else f'k is {k}'}: request more (`prompt_logprobs: K`)"
                + ("." if k is None else ", or pass a smaller -k.")
            )
        if not self.max_k or record.max_k < self.max_k:
            self.max_k, self._shortest = record.max_k, record.where
        if record.min_k > self.min_k:
            self.min_k, self._longest = record.min_k, record.where
        if k is None and self.min_k > self.max_k:
            raise DistillError(
                f"{self._shortest} has positions with {self.max_k} of the most probable ids, and {self._longest} has "
                f"some with {self.min_k}. Pass -k {self.max_k} to keep {self.max_k} of each position."
            )


def _check_same(earlier: TokenRecord, record: TokenRecord, row: NeededRow) -> None:
    """Refuse two records of one text that differ.

    Ids of nearly equal probability may change places with the first one that is left out, so an id that only one record
    has is compared with the least probable id of the other one.
    """
    k = min(earlier.max_k, record.max_k)
    tables = [
        [dict(zip(*pair, strict=True)) for pair in zip(*top_k(each, row.positions, k), strict=True)]
        for each in (earlier, record)
    ]
    for position, first, second in zip(row.positions, *tables, strict=True):
        low, other_low = min(first.values()), min(second.values())
        differences = [abs(first.get(i, low) - second.get(i, other_low)) for i in {*first, *second}]
        if max(differences) > _SAME_NATS:
            raise DistillError(
                f"{record.where} and {earlier.where} have the same text and different log-probabilities (at position "
                f"{position}). Import the records of one teacher only."
            )


def _unused_message(record: TokenRecord, index: RowIndex) -> str:
    """Return the message about a record of another text, with the longest beginning that it shares with a row."""
    common = max((_common_length(record.tokens, row.tokens) for row in index.rows.values()), default=0)
    return (
        f"{record.where} has a text of {len(record.tokens)} tokens that is no row of the recipe"
        + (f"; the most similar row has the same first {common} tokens" if common else "")
        + ". Text, chat template, max_length, seed and held-out rows of the recipe decide what its rows are. Change "
        "the recipe, request the log-probabilities of its rows (--missing FILE writes their token ids), or pass "
        "--allow-unused to skip records of other texts."
    )


def _common_length(tokens: np.ndarray, ids: np.ndarray) -> int:
    count = min(len(tokens), len(ids))
    differ = np.flatnonzero(tokens[:count] != ids[:count])
    return int(differ[0]) if len(differ) else count
