"""External text, made safe for the place that shows it: a terminal, Markdown, YAML or HTML. Imports no torch.

External text is whatever the user of this process did not type: names of models and data sets, sample text, licences,
task names, recipes and errors of a server. Each target has one function, and all code that writes to it uses that one.
"""

import html
import re
from typing import Any

import yaml

# C0 and C1 controls except tab and newline, and the characters that reorder the text around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_INLINE = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BLOCK_MARKER = re.compile(r"^(\d{1,9})?([#+\-.)])(?=[#\s]|--)")


def printable(text: str) -> str:
    """Text without control characters: a terminal that shows it executes no escape sequence.

    Args:
        text: of any origin; tabs and newlines stay.
    """
    return _CONTROLS.sub("", text.replace("\r\n", "\n"))


def markdown(text: Any) -> str:
    """Text as one line of Markdown that renders as it reads: no markup, no HTML, no formula, no table cell ends in it.

    Args:
        text: of any origin; anything else is converted by `str`.
    """
    line = " ".join(printable(str(text)).split())
    line = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], line)
    return _BLOCK_MARKER.sub(
        lambda found: f"{found[1] or ''}\\{found[2]}", _INLINE.sub(lambda found: f"\\{found[0]}", line)
    )


def code_span(text: Any) -> str:
    """Text as a code span of Markdown, on one line.

    Args:
        text: of any origin; anything else is converted by `str`.
    """
    line = " ".join(printable(str(text)).split())
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """Text as a fenced block of Markdown, whose fence is longer than any run of backticks in the text.

    Args:
        text: of any origin.
        language: of the block; our own word.
    """
    text = printable(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def yaml_text(values: Any) -> str:
    """Plain values as a YAML document: no text in them becomes a key, a tag or the end of the document.

    Args:
        values: dicts, lists, strings, numbers, booleans and None.
    """
    return yaml.safe_dump(values, sort_keys=False, width=100).strip()


def html_text(text: Any) -> str:
    """Text for an element or a quoted attribute of HTML.

    Args:
        text: of any origin; anything else is converted by `str`.
    """
    return html.escape(printable(str(text)))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
