"""The console of all commands; it prints text without interpreting it."""

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from ..core.escape import printable


class TextConsole(Console):
    """A console that does not interpret markup, emoji codes and control characters in the text that it prints.

    Styles come from `style=`, `rich.text.Text` and the columns of tables. Names, paths, recipes and error messages of
    servers need no escaping. The width is that of the terminal, or of COLUMNS, when something is printed.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)
        if "width" not in options:
            self._width = None  # rich keeps the COLUMNS of the time at which the console was created

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render to segments, without the control characters of the text; those of the console itself are kept."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def write_text(text: str) -> None:
    """Write text to the standard output without formatting and without control characters.

    Args:
        text: the text; no newline is added.
    """
    sys.stdout.write(printable(text))
