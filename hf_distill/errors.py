"""The one exception that bad input raises, and the words that help to mend it."""

from collections.abc import Iterable
from difflib import get_close_matches


class DistillError(ValueError):
    """Bad input: the message says what was given, what is possible, and what to do."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or the list of names when none is close."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1, cutoff=0.7)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else ""
