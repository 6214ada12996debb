"""The command line: the one place that prints. Exit codes: 0 done, 1 the run failed, 2 the input was wrong."""

import os
import sys
import traceback

from rich.console import Console
from rich.text import Text

from ..errors import DistillError
from . import caches, curving, diagnosing, inspecting, publishing, recipes, reporting, retaining, running, tempering  # noqa: F401  each adds its commands
from .app import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the program; wrong input is told in words, with exit code 2."""
    try:
        app()
    except DistillError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a machine see the same
            Console(stderr=True).print(Text("Error: ", "bold red").append(str(error), "default"), soft_wrap=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
