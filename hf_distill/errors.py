"""Exceptions, and helpers that collect problems and suggest names in their messages."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec


class DistillError(ValueError):
    """An input is invalid: the message says what was given, what is possible, and what to do.

    All problems of an input are reported at once. It is a `ValueError`, and everything of this package that refuses an
    argument, a recipe, a model or a file raises it.
    """


class RunError(RuntimeError):
    """A run cannot continue although its input is valid: the message says why, what exists, and what to do."""


class RunInterrupted(SystemExit):
    """A signal ended the run after it was saved; the exit code is 128 plus the number of the signal."""


@contextmanager
def collect_errors(problems: list[str]) -> Iterator[None]:
    """Append the message of a DistillError in the block to `problems`; `raise_if_any` raises all of them at once."""
    try:
        yield
    except DistillError as error:
        problems.append(str(error))


def raise_if_any(problems: list[str]) -> None:
    """Raise one DistillError with all problems, if there are any."""
    if problems:
        raise DistillError("; ".join(problems))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Return the known name that is closest to a name; None if none is close."""
    return next(iter(get_close_matches(name, sorted(names), n=1, cutoff=0.7)), None)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" with the closest known name, or up to 20 known names if none is close."""
    names = sorted(names)
    if closest := nearest(name, names):
        return f"; did you mean {closest!r}?"
    return f"; known: {', '.join(names)}" if len(names) <= 20 else ""


def require_package(package: str, extra: str, purpose: str) -> None:
    """Raise a DistillError with the command that installs an optional package, if it is not installed."""
    if find_spec(package) is None:
        raise DistillError(f'{purpose} needs {package}, which is not installed: pip install "hf-distill[{extra}]"')
