"""What training will see: rows of a recipe, decoded, with what is asked and where each is from."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any

from transformers import AutoTokenizer

from ..core.targets import IGNORE_INDEX
from ..data import unpack_row
from ..recipe.schema import Recipe
from .datasets import first_rows
from .model_loading import load_pretrained

_EXAMPLES = 200


@dataclass(frozen=True)
class Preview:
    """A document of a row.

    row:    which row it is in, from 0; several documents share a packed one
    source: name of its source
    tokens: how many
    asked:  how many of them are predicted; never a document's first
    spans:  (text, whether it is asked), in order
    """

    row: int
    source: str
    tokens: int
    asked: int
    spans: list[tuple[str, bool]]


def preview_rows(recipe: Recipe, rows: int = 3) -> list[Preview]:
    """The documents of the first rows of a recipe's mixture, before the trainer shuffles them.

    No model is loaded, and of each source only the first 200 examples are read.

    Raises:
        DistillError: an input is wrong; as `run_recipe`.
    """
    tokenizer: Any = load_pretrained(AutoTokenizer, recipe.tokenizer_model, revision=recipe.tokenizer_revision)
    seed = 42 if recipe.train.seed is None else recipe.train.seed
    found = first_rows(recipe, tokenizer, seed, _EXAMPLES)
    return [
        document
        for number, row in enumerate(islice(found, rows))
        for document in _documents(number, row, list(recipe.data.sources), tokenizer)
    ]


def _documents(number: int, row: dict, names: list[str], tokenizer: Any) -> Iterator[Preview]:
    start = 0
    for document in unpack_row(row):
        ids = document["input_ids"]
        asked = [i > 0 and label != IGNORE_INDEX for i, label in enumerate(document["labels"])]
        source = row.get("source", 0)
        source = source[start] if isinstance(source, list) else source
        start += len(ids)
        spans = [
            (tokenizer.decode([token for token, _ in group]), wanted)
            for wanted, group in groupby(zip(ids, asked, strict=True), key=lambda pair: pair[1])
        ]
        yield Preview(number, names[source], len(ids), sum(asked), spans)
