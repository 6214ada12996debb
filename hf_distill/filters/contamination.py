"""The filter that removes rows which contain texts of evaluation tasks. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, Self

from pydantic import Field, model_validator
from xxhash import xxh3_64_intdigest

from ..core.defaults import EVALUATION_SPLIT
from ..core.strict_model import Name, StrictModel
from ..errors import DistillError, did_you_mean
from .base import RowFilter
from .rows import Row, completion_text, prompt_text
from .words import ngrams, words


class EvaluationTexts(StrictModel):
    """Texts of an evaluation task: a data set, or a file."""

    path: Name = Field(
        description="Dataset id on the Hub; path to a .txt, .jsonl, .json, .csv, .parquet or .arrow file; or "
        "save_to_disk folder."
    )
    split: str = Field(
        EVALUATION_SPLIT, description=f"Split of the dataset. Default: {EVALUATION_SPLIT}. Files have no splits."
    )
    name: str | None = Field(None, description="Configuration (subset) of the dataset. Default: the dataset's default.")
    columns: list[str] | None = Field(
        None, min_length=1, description="Columns that are compared. Default (null): all columns with text."
    )


class Decontaminate(RowFilter):
    """Removes rows whose prompt or completion has an n-gram of words in common with a text of an evaluation task.

    Case and punctuation are ignored. A text of the task with fewer than n words is found if all of it occurs, and one
    with fewer than `min_words` is not compared. Source: Brown et al., 2005.14165, appendix C.
    """

    name: Literal["decontaminate"] = "decontaminate"
    data: list[EvaluationTexts] = Field(min_length=1, description="The evaluation tasks.")
    n: int = Field(13, ge=1, description="Number of words in an n-gram, at least 1. Default: 13.")
    min_words: int = Field(
        8, ge=1, description="Texts of a task with fewer words are not compared, at most n. Default: 8."
    )

    @model_validator(mode="before")
    @classmethod
    def _lower_min_words(cls, values: object) -> object:
        """Set the default of `min_words` to n, if n is smaller."""
        if isinstance(values, Mapping) and isinstance(n := values.get("n"), int) and n < 8:
            return {"min_words": n, **values}
        return values

    @model_validator(mode="after")
    def _check_min_words(self) -> Self:
        if self.min_words > self.n:
            raise ValueError(f"min_words is {self.min_words} and n is {self.n}; min_words must be at most n")
        return self

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set in order."""
        texts = [text for data in self.data for text in evaluation_texts(data)]
        return self.compare_with(texts)

    def compare_with(self, texts: Iterable[str]) -> Callable[[Row], bool]:
        """Return the function that judges rows, for given texts of evaluation tasks."""
        tokenized = [words(text) for text in texts]
        long_enough = [tokens for tokens in tokenized if len(tokens) >= self.min_words]
        if not long_enough:
            raise DistillError(
                f"decontaminate: none of {len(tokenized):,} texts of the evaluation tasks has {self.min_words} words, "
                "so rows cannot be compared with them. Check data and columns, or lower min_words."
            )
        lengths = {min(self.n, len(tokens)) for tokens in long_enough}
        known = {gram for tokens in long_enough for gram in _hashes(tokens, min(self.n, len(tokens)))}

        def keep(row: Row) -> bool:
            parts = [words(prompt_text(row)), words(completion_text(row))]
            return all(known.isdisjoint(_hashes(tokens, n)) for tokens in parts for n in lengths)

        return keep


def evaluation_texts(data: EvaluationTexts) -> list[str]:
    """Return the texts in the rows of an evaluation task: strings, also those in lists and mappings.

    Raises:
        DistillError: there is no such data set, file or column.
    """
    from ..data.load import load_columns

    texts: list[str] = []
    for row in load_columns(data.path, data.split, data.name):
        for name in data.columns or row:
            if name not in row:
                raise DistillError(f"decontaminate: {data.path} has no column {name!r}{did_you_mean(name, row)}")
            texts += _strings(row[name])
    return texts


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _hashes(tokens: list[str], n: int) -> Iterator[int]:
    """Yield a number of 64 bits for each n-gram."""
    return (xxh3_64_intdigest(" ".join(gram).encode()) for gram in ngrams(tokens, n))
