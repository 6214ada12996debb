"""Downloaded files that are not what they should be: whatever a library raises over them becomes one line."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..core.escape import printable
from ..errors import DistillError, RunError

_LONGEST = 500  # characters of a library's message that are shown


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn any exception of a library that reads a file of somebody else into a DistillError of one line.

    Args:
        what: that is read, such as "org/name, the tokenizer,".

    Raises:
        DistillError: the block raised anything but errors of this package and a lack of memory.
    """
    try:
        yield
    except (DistillError, RunError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported here
            raise
        raise DistillError(f"{what} cannot be loaded: {line_of(error)}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # of libraries in Rust
            raise
        raise DistillError(f"{what} cannot be loaded: {line_of(error)}") from error


def line_of(error: BaseException) -> str:
    """An exception's message as one line, with its type where the message alone says little.

    Args:
        error: of any library.
    """
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        return line_of(error.__cause__)  # which says what the error of `datasets` does not
    text = " ".join(printable(str(error)).split())
    text = text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
    named = isinstance(error, OSError | ValueError | RuntimeError | ImportError) and text
    return text if named else f"{type(error).__name__}: {text}".rstrip(": ")
