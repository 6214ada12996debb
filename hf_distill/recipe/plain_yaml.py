"""What no value of a recipe may be, whichever field it stands in: checked before the fields themselves."""

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

Place: TypeAlias = tuple[str | int, ...]
_BITS = 64
_KEPT_CONTROLS = "\t\n\r"


def impossible_values(value: Any, here: Place = ()) -> Iterator[tuple[Place, str]]:
    """(place, what is wrong) of each value that no field takes.

    These are NaN and infinity, whole numbers beyond 64 bits, and text that no file name, log or terminal can hold:
    control characters such as NUL or escape, and halves of surrogate pairs.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if problem := _problem_of(key):
                yield (*here, printable(str(key))), f"as a key, {problem}"
            yield from impossible_values(inner, (*here, key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from impossible_values(inner, (*here, number))
    elif problem := _problem_of(value):
        yield here, problem


def replaced(value: Any) -> Any:
    """The same values with a possible one of the same type in the place of each impossible one.

    The fields are checked on these, so that all other problems are found too.
    """
    if isinstance(value, dict):
        return {replaced(key): replaced(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(inner) for inner in value]
    if _problem_of(value) is None:
        return value
    return printable(value) if isinstance(value, str) else type(value)(1)


def printable(text: str) -> str:
    """A text with all that is not printable escaped as in Python."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def short_text(value: Any) -> str:
    """A key or name as a line can hold it."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def short(value: Any) -> str:
    """A value as a line can hold it."""
    try:
        text = repr(value)
    except ValueError:  # a whole number with more digits than Python writes
        return f"a {type(value).__name__} that is too long to be shown"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _problem_of(value: Any) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() >= _BITS:
        return f"a whole number of {value.bit_length()} bits; at most {_BITS - 1} are possible"
    if isinstance(value, str):
        return _problem_of_text(value)
    return None


def _problem_of_text(text: str) -> str | None:
    for character in text:
        code = ord(character)
        if (code < 32 or 127 <= code < 160) and character not in _KEPT_CONTROLS:
            return f"text with the control character U+{code:04X}"
        if 0xD800 <= code < 0xE000:
            return f"text with U+{code:04X}, which is half of a surrogate pair and no character"
    return None
