"""Which ids are kept when a vocabulary is trimmed."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ...errors import DistillError
from .tokenizer_content import TokenizerContent


def close_over(content: TokenizerContent, ids: Iterable[int]) -> list[int]:
    """Return ids with the mandatory ones of a tokenizer and all that they need, in ascending order.

    Args:
        content: the content of the tokenizer.
        ids: ids to keep.

    Raises:
        DistillError: the tokenizer does not have an id.
    """
    kept = {int(index) for index in ids}
    if foreign := sorted(kept - content.tokens.keys()):
        raise DistillError(
            f"The tokenizer has no token for {len(foreign)} of the ids to keep (first: {foreign[0]}); it has "
            f"{len(content.tokens)} tokens. Give ids of this tokenizer, the one that the data was tokenized with."
        )
    kept |= content.mandatory
    return sorted(kept.union(*(content.needed_by(index) for index in kept)))


def most_frequent_ids(
    content: TokenizerContent, counts: Mapping[int, int], size: int, required: Iterable[int] = ()
) -> list[int]:
    """Return `size` ids: the mandatory ones, then the most frequent ones with those that they need.

    An id that needs more others than there is room for is left out. Room that is left when every id that occurs is kept
    is filled with the lowest ids, which are the most frequent ones of the text that a BPE tokenizer was trained on.

    Args:
        content: the content of the tokenizer.
        counts: id -> how often it occurs.
        size: number of ids.
        required: further ids that are always kept.

    Returns:
        the ids in ascending order.

    Raises:
        DistillError: the tokenizer has fewer ids, or the mandatory ones are more.
    """
    kept = set(close_over(content, required))
    if size > len(content.tokens):
        raise DistillError(
            f"keep is {size}, and the tokenizer has {len(content.tokens)} tokens: lower it, or remove `vocab` to keep "
            "all tokens."
        )
    if size < len(kept):
        raise DistillError(
            f"keep is {size}, and {len(kept)} tokens of this tokenizer are always kept, without which some text could "
            f"not be encoded (special and added tokens, bytes or single characters): give at least {len(kept)}."
        )
    foreign = counts.keys() - content.tokens.keys()
    if foreign:
        raise DistillError(
            f"The data has {len(foreign)} ids that the tokenizer has no token for (first: {min(foreign)})."
        )
    frequent = sorted((index for index in counts if counts[index] > 0), key=lambda index: (-counts[index], index))
    _fill(content, kept, frequent, size)
    while len(kept) < size:  # each pass keeps at least the lowest id all of whose needed ids are kept
        _fill(content, kept, sorted(content.tokens.keys() - kept), size)
    return sorted(kept)


def _fill(content: TokenizerContent, kept: set[int], ids: Iterable[int], size: int) -> None:
    """Keep further ids, with those that they need, as long as there is room for them."""
    for index in ids:
        if len(kept) == size:
            return
        if index not in kept and len(needed := {index, *content.needed_by(index)} - kept) <= size - len(kept):
            kept |= needed


def count_ids(rows: Any) -> Counter[int]:
    """Return how often each token id occurs in rows.

    Args:
        rows: a data set or an iterable of rows with the column `input_ids`.

    Raises:
        DistillError: they have none.
    """
    counts = Counter[int]()
    if hasattr(rows, "with_format") and hasattr(rows, "data") and "input_ids" in rows.column_names:
        import pyarrow.compute as pc

        for batch in rows.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=1000):
            for entry in pc.value_counts(pc.list_flatten(batch["input_ids"])).to_pylist():
                counts[entry["values"]] += entry["counts"]
        return counts
    for row in rows:
        if "input_ids" not in row:
            raise DistillError(f"The rows have no `input_ids`; they have {', '.join(row)}: tokenize them first.")
        counts.update(int(index) for index in row["input_ids"])
    return counts


def frequent_ids(tokenizer: Any, rows: Any, size: int, required: Iterable[int] = ()) -> list[int]:
    """Return `size` ids of a tokenizer: those that are always kept, and the most frequent ones of some rows.

    Args:
        tokenizer: the tokenizer that the rows were made with.
        rows: see `count_ids`.
        size: number of ids, the vocabulary size after `trim_vocabulary`.
        required: further ids that are always kept, such as those that a model's configs name.

    Raises:
        DistillError: see `most_frequent_ids`.
    """
    return most_frequent_ids(TokenizerContent(tokenizer), count_ids(rows), size, required)
