"""Rows of tokens for a student with a trimmed vocabulary: their new ids, and the bytes of their text."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..core.results import Metrics
from ..core.targets import IGNORE_INDEX
from ..data import Examples
from ..data.alignment.special_tokens import special_tokens
from ..data.alignment.token_bytes import text_rules, token_bytes
from ..errors import DistillError
from ..models.vocabulary import count_ids

_REMOVED = -1  # in place of an id that the trimmed vocabulary does not have


@dataclass(frozen=True)
class Trimming:
    """The vocabulary of a student that has fewer tokens than its teacher.

    Attributes:
        full_tokenizer: The tokenizer of the teacher.
        kept_ids: For each id of the student, the id of the same token in the teacher's vocabulary.
    """

    full_tokenizer: Any
    kept_ids: Sequence[int]


def with_new_ids(rows: Examples, kept_ids: Sequence[int]) -> Examples:
    """Return rows of tokens with the ids of a trimmed vocabulary; see `check_no_removed_ids`.

    Args:
        rows: Rows with `input_ids` and `labels` in the ids of the full vocabulary.
        kept_ids: For each id of the trimmed vocabulary, that of the same token in the full one.
    """
    mapped = {IGNORE_INDEX: IGNORE_INDEX, **{old: new for new, old in enumerate(kept_ids)}}

    def renumbered(row: dict[str, Any]) -> dict[str, list[int]]:
        return {name: [mapped.get(index, _REMOVED) for index in row[name]] for name in ("input_ids", "labels")}

    return rows.map(renumbered)


def check_no_removed_ids(rows: Examples, where: str) -> None:
    """Check that the rows that are used have no token that the trimmed vocabulary does not have.

    Args:
        rows: Rows, of which `with_new_ids` made some.
        where: Name of the rows in the error.

    Raises:
        DistillError: They have one.
    """
    if count := count_ids(rows)[_REMOVED]:
        raise DistillError(
            f"{count} tokens of {where} are given as ids that the trimmed vocabulary does not have: set "
            "student.from_teacher.vocab.keep to used or a larger number, or give the source as text, which is "
            "tokenized again."
        )


def bits_per_byte(rows: Any, tokenizer: Any) -> float | None:
    """Return the bits per byte of a perplexity of e: the target tokens for each byte of their text, over ln 2.

    Args:
        rows: Rows with `input_ids` and `labels`.
        tokenizer: Their tokenizer.

    Returns:
        None if the bytes of its tokens are not known.
    """
    try:
        rules = text_rules(tokenizer)
    except DistillError:
        return None
    table = token_bytes(tokenizer, rules, special_tokens(tokenizer))
    tokens = num_bytes = 0
    for row in rows:
        targets = [label for _, label in pairwise(row["labels"]) if label != IGNORE_INDEX]
        tokens += len(targets)
        num_bytes += int(table.lengths[[index for index in targets if not table.is_special[index]]].sum())
    return tokens / num_bytes / math.log(2) if num_bytes else None


def with_bits_per_byte(metrics: Metrics, factor: float | None) -> Metrics:
    """Return metrics with the bits per byte of student and teacher, which vocabularies of other tokens are compared by.

    Args:
        metrics: Metrics with `perplexity` of the target tokens.
        factor: See `bits_per_byte`.
    """
    names = {"perplexity": "bits_per_byte", "teacher_perplexity": "teacher_bits_per_byte"}
    if factor is None:
        return metrics
    return metrics | {new: factor * math.log(metrics[old]) for old, new in names.items() if old in metrics}
