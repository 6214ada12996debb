"""Checks for values that are not possible in any field of a recipe."""

import math
from collections.abc import Iterator
from typing import Any, TypeAlias

Location: TypeAlias = tuple[str | int, ...]
_MAX_INT_BITS = 64
_ALLOWED_CONTROLS = "\t\n\r"


def impossible_values(value: object, location: Location = ()) -> Iterator[tuple[Location, str]]:
    """Yield the location and the problem of each value that no field accepts.

    These are NaN and infinity, integers that need 64 bits or more, and text that a file name, log or terminal cannot
    hold: control characters such as NUL or escape, and unpaired surrogates.
    """
    if isinstance(value, dict):
        for key, inner in value.items():
            if problem := _problem_of(key):
                yield (*location, printable(str(key))), f"as a key, {problem}"
            yield from impossible_values(inner, (*location, key))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from impossible_values(inner, (*location, number))
    elif problem := _problem_of(value):
        yield location, problem


def replace_impossible(value: object) -> Any:
    """Replace each impossible value by a possible one of the same type.

    The fields are then validated with these values, so that all other problems are found too.
    """
    if isinstance(value, dict):
        return {replace_impossible(key): replace_impossible(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_impossible(inner) for inner in value]
    if _problem_of(value) is None:
        return value
    if isinstance(value, str):
        return printable(value)
    return 1.0 if isinstance(value, float) else 1


def printable(text: str) -> str:
    """Escape all characters that are not printable, as in a Python string literal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def short_text(value: object) -> str:
    """Return a key or name, shortened to 80 characters."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def short(value: object) -> str:
    """Return the repr of a value, shortened to 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python converts to text
        return f"a {type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else f"{text[:80]}..."


def _problem_of(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() >= _MAX_INT_BITS:
        return f"an integer of {value.bit_length()} bits; at most {_MAX_INT_BITS - 1} bits are possible"
    if isinstance(value, str):
        return _problem_of_text(value)
    return None


def _problem_of_text(text: str) -> str | None:
    for character in text:
        code = ord(character)
        if (code < 32 or 127 <= code < 160) and character not in _ALLOWED_CONTROLS:
            return f"the text contains the control character U+{code:04X}"
        if 0xD800 <= code < 0xE000:
            return f"the text contains U+{code:04X}, which is half of a surrogate pair and not a character"
    return None
