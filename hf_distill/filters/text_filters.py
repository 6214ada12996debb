"""Filters on the text of one completion: length, unfinished, repetition, banned_ngrams. Imports no torch."""

from collections.abc import Callable
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from .base import RowFilter, SingleRowFilter
from .rows import Row, column, completion_text
from .words import ngrams, words, words_and_marks


class Length(SingleRowFilter):
    """Keeps completions whose length is in a range, in tokens of the teacher or in characters."""

    name: Literal["length"] = "length"
    min_tokens: int | None = Field(None, ge=0, description="Minimum number of tokens. Default (null): no minimum.")
    max_tokens: int | None = Field(None, ge=0, description="Maximum number of tokens. Default (null): no maximum.")
    min_characters: int | None = Field(
        None, ge=0, description="Minimum number of characters. Default (null): no minimum."
    )
    max_characters: int | None = Field(
        None, ge=0, description="Maximum number of characters. Default (null): no maximum."
    )

    @model_validator(mode="after")
    def _check_limits(self) -> Self:
        if not self.model_fields_set - {"name"}:
            raise ValueError("length has no limit: set min_tokens, max_tokens, min_characters or max_characters")
        for unit in ("tokens", "characters"):
            low, high = getattr(self, f"min_{unit}"), getattr(self, f"max_{unit}")
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} is {low} and max_{unit} is {high}: no completion has such a length")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads in addition to `prompt`, `completion` and `source`."""
        return ("tokens",) if (self.min_tokens, self.max_tokens) != (None, None) else ()

    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""
        lengths = [(len(completion_text(row)), self.min_characters, self.max_characters)]
        if self.columns:
            tokens = column(row, "tokens", "length")
            if not isinstance(tokens, int):
                raise TypeError(f"the column tokens is {tokens!r}; it must be a number of tokens")
            lengths.append((tokens, self.min_tokens, self.max_tokens))
        return all((low is None or low <= length) and (high is None or length <= high) for length, low, high in lengths)


class Unfinished(SingleRowFilter):
    """Removes completions that did not end by themselves: `finish_reason` is not "stop"."""

    name: Literal["unfinished"] = "unfinished"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads in addition to `prompt`, `completion` and `source`."""
        return ("finish_reason",)

    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""
        return column(row, "finish_reason", "unfinished") == "stop"


class Repetition(SingleRowFilter):
    """Removes completions that repeat themselves: 1 - distinct n-grams / n-grams is above `max_share`.

    The n-grams are those of words and punctuation marks. Source: seq-rep-n of Welleck et al., 1908.04319.
    """

    name: Literal["repetition"] = "repetition"
    n: int = Field(4, ge=1, description="Number of words in an n-gram, at least 1. Default: 4.")
    max_share: float = Field(
        0.5, ge=0, lt=1, description="Maximum share of n-grams that occurred before in the completion. Default: 0.5."
    )

    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""
        return repeated_share(completion_text(row), self.n) <= self.max_share


def repeated_share(text: str, n: int) -> float:
    """Return 1 - distinct n-grams / n-grams of a text; 0 if it has fewer than n words and punctuation marks."""
    grams = ngrams(words_and_marks(text), n)
    return 1 - len({*grams}) / len(grams) if grams else 0.0


class BannedNgrams(RowFilter):
    """Removes completions that contain one of some phrases, as whole words, ignoring case and punctuation."""

    name: Literal["banned_ngrams"] = "banned_ngrams"
    phrases: list[str] = Field(min_length=1, description="The phrases, such as 'as an AI language model'.")

    @field_validator("phrases")
    @classmethod
    def _check_phrases(cls, phrases: list[str]) -> list[str]:
        if empty := [phrase for phrase in phrases if not words(phrase)]:
            raise ValueError(f"{empty[0]!r} has no words, and phrases are compared by their words")
        return phrases

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set in order."""
        phrases = {tuple(words(phrase)) for phrase in self.phrases}
        lengths = {len(phrase) for phrase in phrases}

        def keep(row: Row) -> bool:
            text = words(completion_text(row))
            return all(phrases.isdisjoint(ngrams(text, n)) for n in lengths)

        return keep
