"""Reads the answer of a completion, and compares answers: exact, numeric, multiple choice, mathematics.

Imports no torch. math-verify reads and compares all answers but exact ones: https://github.com/huggingface/Math-Verify
"""

import re
import threading
import unicodedata
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from pydantic import Field

from ..errors import DistillError
from .base import Step

# A text (exact), or what math-verify reads: expressions of sympy or texts.
Answer: TypeAlias = str | list[Any]
_MARKUP = re.compile(r"\\boxed|\\text|[(){}\[\]*_`$]")
_FORMULA = re.compile(r"\$|\\boxed|\\\(|\\\[")
_SCIENTIFIC = re.compile(r"\d+(?:\.\d+)?[eE][+-]?\d{1,2}\b")
_TIMEOUT_SECONDS = 5


class AnswerStep(Step):
    """A filter or selection that reads answers, with the options for how they are read and compared."""

    compare: Literal["exact", "numeric", "choice", "math"] = Field(
        description="exact: equal text, ignoring case, whitespace and a full stop at the end. numeric: the number "
        "after the word answer, or the last number, equal to 6 decimals. choice: the letter after the word "
        "answer, or in the last line. math: the boxed or last formula or number, equal after simplification."
    )
    after: str | None = Field(
        None,
        min_length=1,
        description="The answer follows the last occurrence of this text, such as '####'. A completion without it has "
        "no answer. Default (null): the answer is looked for in the whole completion.",
    )
    choices: list[str] = Field(
        ["A", "B", "C", "D", "E"], min_length=2, description="Letters for compare: choice. Default: A to E."
    )

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules of the optional packages that it needs."""
        return () if self.compare == "exact" else ("math_verify",)

    def check_thread(self) -> None:
        """Raise a DistillError outside of the main thread, where math-verify cannot limit its time."""
        if self.compare != "exact" and threading.current_thread() is not threading.main_thread():
            raise DistillError(
                f"{self.name} with compare: {self.compare} runs in the main thread only, because math-verify limits "
                "its time by a signal. Apply the filters in the main thread."
            )

    def read_answer(self, text: str) -> Answer | None:
        """Return the answer in a completion; None if there is none.

        Raises:
            TimeoutError: math-verify needs more than 5 seconds.
        """
        if self.after is not None:
            _, marker, text = text.rpartition(self.after)
            if not marker:
                return None
        match self.compare:
            case "exact":
                return _plain(text) or None
            case "numeric":
                return _parse(_SCIENTIFIC.sub(_as_decimal, text), "expression") or None
            case "choice":
                return self._read_choice(text) or None
            case "math":
                return _parse(text, "latex", "expression") or None

    def read_reference(self, value: object, after: str | None = None) -> Answer:
        """Return a reference answer.

        Args:
            value: a text or a number. For multiple choice, an integer is the index of a choice.
            after: the answer follows the last occurrence of this text; None: the whole text is the answer.

        Raises:
            ValueError: it cannot be read.
            TimeoutError: see `read_answer`.
        """
        if self.compare == "choice":
            value = self._choice_of(value)
        if isinstance(value, bool) or not isinstance(value, str | int | float):
            raise ValueError(f"the reference answer {value!r} is not a text or a number")
        if after is not None and after not in str(value):
            raise ValueError(f"the reference answer {value!r} does not contain {after!r}")
        text = str(value).rpartition(after)[2] if after else str(value)
        if self.compare == "math" and not _FORMULA.search(text):
            text = f"\\boxed{{{text.strip()}}}"
        answer = self.model_copy(update={"after": None}).read_answer(text)
        if answer is None:
            raise ValueError(f"the reference answer {value!r} cannot be read as {_KINDS[self.compare]}")
        return answer

    def is_same(self, reference: Answer, answer: Answer) -> bool:
        """Whether an answer equals a reference.

        Raises:
            TimeoutError: math-verify needs more than 5 seconds.
        """
        if isinstance(reference, str) or isinstance(answer, str):
            return reference == answer
        from math_verify import verify
        from math_verify.errors import TimeoutException

        pairs = [(reference, answer)]
        if self.compare == "numeric":  # verify does not compare an integer with a float to 6 decimals
            pairs.append(([value.evalf() for value in reference], [value.evalf() for value in answer]))
        try:
            return any(verify(*pair, timeout_seconds=_TIMEOUT_SECONDS, raise_on_error=True) for pair in pairs)
        except TimeoutException:  # not an Exception
            raise TimeoutError(f"comparing two answers takes more than {_TIMEOUT_SECONDS} seconds") from None

    def _choice_of(self, value: object) -> object:
        """Return the letter that an index or a letter of any case stands for; other values as they are."""
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(self.choices):
                raise ValueError(f"the reference answer {value} is not the index of one of {len(self.choices)} choices")
            return self.choices[value]
        letters = {letter.casefold(): letter for letter in self.choices}
        return letters.get(value.strip().casefold(), value) if isinstance(value, str) else value

    def _read_choice(self, text: str) -> list[Any]:
        """Return the letter after the word answer; without one, the letter in the last line."""
        text = _MARKUP.sub(" ", text)
        lines = [line for line in text.splitlines() if line.strip()]
        letters = tuple(self.choices)
        return _parse(text, "anchored choice", letters=letters) or _parse(
            lines[-1] if lines else "", "choice", letters=letters
        )


_KINDS = {"exact": "text", "numeric": "a number", "choice": "a choice", "math": "a formula or number"}


def _plain(text: str) -> str:
    """Return a text in lower case with single spaces, without a full stop at the end."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).removesuffix(".").rstrip()


def _as_decimal(match: re.Match[str]) -> str:
    """Return a number such as 1.5e3 without an exponent, which math-verify does not read."""
    return format(Decimal(match[0]), "f")


def _parse(text: str, *kinds: str, letters: tuple[str, ...] = ()) -> list[Any]:
    """Return what math-verify reads in a text; an empty list if there is none."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, StringExtractionConfig, parse
    from math_verify.errors import TimeoutException

    configs = {
        "expression": ExprExtractionConfig(),
        "latex": LatexExtractionConfig(),
        "choice": StringExtractionConfig(strings=letters),
        "anchored choice": StringExtractionConfig(strings=letters, try_extract_without_anchor=False),
    }
    try:
        return list(
            parse(
                text,
                [configs[kind] for kind in kinds],
                fallback_mode="no_fallback",
                parsing_timeout=_TIMEOUT_SECONDS,
                raise_on_error=True,
            )
        )
    except TimeoutException:  # not an Exception
        raise TimeoutError(f"reading an answer takes more than {_TIMEOUT_SECONDS} seconds") from None
