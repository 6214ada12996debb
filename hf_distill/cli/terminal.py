"""The console of all commands: what it prints is text, whoever wrote it."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.segment import Segment

from ..core.escape import printable


class TextConsole(Console):
    """A console that interprets no markup, no emoji codes and no control characters in the text that it is given.

    Styles come from `style=`, `rich.text.Text` and the columns of tables. Names, paths, recipes and errors of servers
    need no escaping.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments of what is printed, without control characters; those of the console itself stay."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def write_text(text: str) -> None:
    """Write text to the standard output as it is, for another program, without control characters.

    Args:
        text: of any origin; the newline at its end is the caller's.
    """
    sys.stdout.write(printable(text))
