"""What `hf-distill recipes preview` shows of the training rows of a recipe."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from ...core.targets import IGNORE_INDEX
from ...data import unpack_row


@dataclass(frozen=True)
class Preview:
    """One document of a row.

    Attributes:
        row: Index of the row, from 0. A packed row has several documents.
        source: Name of the source.
        tokens: Number of tokens; 0 for a row without tokens.
        num_targets: Number of target tokens, or 1 for a label. The first token of a document is never a target.
        spans: The content in order, as (text, whether it is a target).
        counts: The size of the row, for a person.
    """

    row: int
    source: str
    tokens: int
    num_targets: int
    spans: list[tuple[str, bool]]
    counts: str


def document_previews(
    number: int, row: dict, names: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[Preview]:
    """Yield the documents of a row of a language model.

    Args:
        number: Index of the row.
        row: The row, which may be packed.
        names: Names of the sources.
        tokenizer: Its tokenizer.
    """
    start = 0
    for document in unpack_row(row):
        ids = document["input_ids"]
        is_target = [i > 0 and label != IGNORE_INDEX for i, label in enumerate(document["labels"])]
        source = row.get("source", 0)
        source = source[start] if isinstance(source, list) else source
        start += len(ids)
        spans = [
            (str(tokenizer.decode([token for token, _ in group])), target)
            for target, group in groupby(zip(ids, is_target, strict=True), key=lambda pair: pair[1])
        ]
        num_targets = sum(is_target)
        counts = f"{len(ids)} tokens · {num_targets} target tokens"
        yield Preview(number, names[source], len(ids), num_targets, spans, counts)
