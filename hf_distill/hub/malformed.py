"""Malformed files: any exception of a library that reads them becomes a `DistillError` of one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.escape import printable
from ..errors import DistillError, RunError

_MAX_MESSAGE_CHARS = 500  # of a library's message


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any exception of a library that reads an external file into a DistillError of one line.

    Args:
        what: what is read, such as "org/name, the tokenizer,".

    Raises:
        DistillError: the block raised an exception that is neither an error of this package nor a lack of memory.
    """
    try:
        yield
    except (DistillError, RunError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # compared by name because this module imports no torch
            raise
        raise DistillError(f"{what} cannot be loaded: {line_of(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a panic of a Rust library is no Exception
            raise
        raise DistillError(f"{what} cannot be loaded: {line_of(error)}") from error


def line_of(error: BaseException) -> str:
    """Return the message of an exception as one line, with its type where the message alone is not informative.

    Args:
        error: the exception of any library.
    """
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return line_of(error.__cause__)  # only the cause names the problem
    text = " ".join(printable(str(error)).split())
    text = text if len(text) <= _MAX_MESSAGE_CHARS else f"{text[:_MAX_MESSAGE_CHARS]}..."
    is_informative = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and text
    return text if is_informative else f"{type(error).__name__}: {text}".rstrip(": ")
