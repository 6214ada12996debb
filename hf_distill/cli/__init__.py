"""The command line, the only package that prints. Exit codes: 0 success, 1 the run failed, 2 the input is wrong."""

import errno
import os
import sys
import traceback

from rich.text import Text
from typer.main import get_command

from ..core.escape import printable
from ..errors import DistillError, RunError
from .app import app
from .commands import (  # noqa: F401  each adds its commands to the app
    cache,
    curve,
    diagnose,
    draft,
    generate,
    inspect,
    prune,
    publish,
    recipes,
    report,
    retention,
    run,
    serve,
    temperature,
)
from .quiet import add_verbose, silence_other_packages
from .terminal import TextConsole

__all__ = ["app", "main"]


def program() -> None:
    """Run the command of the command line."""
    add_verbose(get_command(app))()


def main() -> None:
    """Run the program; print a message instead of a traceback for wrong input (exit code 2) and failed runs (1)."""
    silence_other_packages()
    try:
        program()
    except DistillError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # all processes of a machine have the same error
            _print_error(str(error))
        sys.exit(2)
    except RunError as error:
        _print_error(str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _print_error(str(error.strerror))
        else:
            sys.stderr.write(printable(traceback.format_exc()))
        sys.exit(1)
    except Exception:
        sys.stderr.write(printable(traceback.format_exc()))
        sys.exit(1)


def _print_error(message: str) -> None:
    text = message.encode("utf-8", "backslashreplace").decode()  # file names may not be valid UTF-8
    TextConsole(stderr=True).print(Text("Error: ", "bold red").append(text, "default"), soft_wrap=True)
