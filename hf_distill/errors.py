"""The one exception that bad input raises, and the words that help to mend it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec


class DistillError(ValueError):
    """Bad input: the message says what was given, what is possible, and what to do."""


class RunError(RuntimeError):
    """A run that cannot go on, though its input was right: the message says why, what there is, and what to do."""


class RunInterrupted(SystemExit):
    """A signal asked for the end, and what was done is kept; the exit code is 128 and the signal's number."""


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Note a DistillError of the block among `problems`, and go on; `tell` raises all of them at once."""
    try:
        yield
    except DistillError as error:
        problems.append(str(error))


def raise_if_any(problems: list[str]) -> None:
    """Raise a DistillError of all problems, if there are any."""
    if problems:
        raise DistillError("; ".join(problems))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is closest to a name; None where none is close."""
    return next(iter(get_close_matches(name, sorted(known), n=1, cutoff=0.7)), None)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or the list of names when none is close."""
    known = sorted(known)
    if near := nearest(name, known):
        return f"; did you mean {near!r}?"
    return f"; known: {', '.join(known)}" if len(known) <= 20 else ""


def require_package(package: str, extra: str, purpose: str) -> None:
    """Raise a DistillError with the command to run where an optional package is not installed."""
    if find_spec(package) is None:
        raise DistillError(f'{purpose} needs {package}, which is not installed: pip install "hf-distill[{extra}]"')
