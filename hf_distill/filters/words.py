"""Splits text into words and n-grams. Imports no torch."""

import re
import unicodedata
from collections.abc import Sequence

# Scripts written without spaces between words, whose characters count as words: kana and Chinese characters.
_CHARACTER = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]"
_WORD = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\w)+")
_WORD_OR_MARK = re.compile(rf"{_WORD.pattern}|[^\w\s]")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation.

    A word is a run of letters and digits; Chinese characters and kana count as words.
    """
    return _WORD.findall(_normalize(text))


def words_and_marks(text: str) -> list[str]:
    """Return the words of a text in lower case and its punctuation marks, each mark by itself."""
    return _WORD_OR_MARK.findall(_normalize(text))


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
    """Return all n-grams of a sequence, in order: none if it is shorter than n."""
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def _normalize(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()
