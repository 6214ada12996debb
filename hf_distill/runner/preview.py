"""Previews the training rows of a recipe: decoded text with target tokens and sources."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..core.defaults import PREVIEWED_ROWS
from ..core.targets import IGNORE_INDEX
from ..data import unpack_row
from ..recipe.schema import Recipe
from .datasets import first_rows
from .model_loading import load_pretrained, load_teacher_tokenizers

_MAX_EXAMPLES = 200


@dataclass(frozen=True)
class Preview:
    """One document of a row.

    Attributes:
        row: Index of the row, from 0. A packed row has several documents.
        source: Name of the source.
        tokens: Number of tokens.
        num_targets: Number of target tokens. The first token of a document is never one.
        spans: The text in order, as (text, whether it consists of target tokens).
    """

    row: int
    source: str
    tokens: int
    num_targets: int
    spans: list[tuple[str, bool]]


def preview_rows(recipe: Recipe, rows: int = PREVIEWED_ROWS) -> list[Preview]:
    """Return the documents of the first rows of a recipe, before the trainer shuffles them.

    No model is loaded, and only the first 200 examples of each source are read.

    Args:
        recipe: The recipe.
        rows: Number of rows.

    Raises:
        DistillError: An input is invalid.
    """
    tokenizer = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    seed = 42 if recipe.train.seed is None else recipe.train.seed
    mixture = first_rows(recipe, tokenizer, seed, _MAX_EXAMPLES, load_teacher_tokenizers(recipe))
    return [
        document
        for number, row in enumerate(islice(mixture, rows))
        for document in _documents(number, row, list(recipe.data.sources), tokenizer)
    ]


def _documents(number: int, row: dict, names: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Preview]:
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
        yield Preview(number, names[source], len(ids), sum(is_target), spans)
