"""The command line: the one place that prints. Exit codes: 0 done, 1 the run failed, 2 the input was wrong."""

import errno
import os
import sys
import traceback

from rich.text import Text
from typer.main import get_command

from ..core.escape import printable
from ..errors import DistillError, RunError
from .app import app
from .commands import cache, curve, diagnose, inspect, publish, recipes, report, retention, run, temperature  # noqa: F401  each adds its commands
from .quiet import add_verbose, silence_other_packages
from .terminal import TextConsole

__all__ = ["app", "main"]


def program() -> None:
    """Run the command that was given."""
    add_verbose(get_command(app))()


def main() -> None:
    """Run the program; wrong input is told in words, with exit code 2; so is what ends a run, with exit code 1."""
    silence_other_packages()
    try:
        program()
    except DistillError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a machine see the same
            _tell(str(error))
        sys.exit(2)
    except RunError as error:
        _tell(str(error))
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _tell(str(error.strerror))
        else:
            sys.stderr.write(printable(traceback.format_exc()))
        sys.exit(1)
    except Exception:
        sys.stderr.write(printable(traceback.format_exc()))
        sys.exit(1)


def _tell(what: str) -> None:
    printable = what.encode("utf-8", "backslashreplace").decode()  # names may hold what UTF-8 cannot
    TextConsole(stderr=True).print(Text("Error: ", "bold red").append(printable, "default"), soft_wrap=True)
