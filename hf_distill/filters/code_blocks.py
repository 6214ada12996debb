"""Code blocks of Markdown text, and the filter that checks that Python code parses. Imports no torch."""

import ast
import re
import warnings
from typing import Literal

from pydantic import Field

from .base import SingleRowFilter
from .rows import Row, completion_text

_LINE_BREAK = re.compile(r"\r\n|\r|\n")  # those of Markdown
_PYTHON = ("python", "python3", "py")


def split_code(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Split Markdown text into prose and fenced code blocks.

    A block without a closing fence reaches to the end of the text.

    Returns:
        The text without the blocks, and (language, code) of each block; the language is in lower case, "" if none.
    """
    from markdown_it import MarkdownIt

    lines = _LINE_BREAK.split(text)
    tokens = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    blocks = [((token.info.split() or [""])[0].lower(), token.content) for token in tokens]
    inside = {line for token in tokens if token.map for line in range(token.map[0], token.map[1])}
    return "\n".join(line for i, line in enumerate(lines) if i not in inside), blocks


def python_parses(code: str) -> bool:
    """Whether a text is Python code that parses with the running version of Python. Nothing is executed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # the last two: code that is nested too deeply
        return False
    return True


class PythonParses(SingleRowFilter):
    """Removes completions with a Python code block that does not parse. No code is executed.

    Code blocks are fenced blocks of Markdown marked as python, python3 or py.
    """

    name: Literal["python_parses"] = "python_parses"
    without_code: Literal["keep", "remove"] = Field(
        "keep", description="Whether completions without a Python code block are kept or removed. Default: keep."
    )

    @property
    def packages(self) -> tuple[str, ...]:
        """Modules of the optional packages that it needs."""
        return ("markdown_it",)

    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""
        blocks = [code for language, code in split_code(completion_text(row))[1] if language in _PYTHON]
        return all(map(python_parses, blocks)) if blocks else self.without_code == "keep"
