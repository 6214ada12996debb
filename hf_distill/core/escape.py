"""Escapes external text for a terminal, Markdown, YAML or HTML. Imports no torch.

External text is all text that the user of this process did not type: names of models and data sets, sample text,
licenses, task names, recipes and error messages of a server. Each target has one function, which all code that writes
to it uses.
"""

import html
import re

import yaml

# C0 and C1 controls except tab and newline, and the characters that reorder the text around them.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
_INLINE = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
_BLOCK_MARKER = re.compile(r"^(\d{1,9})?([#+\-.)])(?=[#\s]|--)")


def printable(text: str) -> str:
    """Return text without control characters, so that a terminal executes no escape sequence.

    Args:
        text: any text; tabs and newlines stay.
    """
    return _CONTROLS.sub("", text.replace("\r\n", "\n"))


def markdown(text: object) -> str:
    """Return text as one line of Markdown that is rendered literally: no markup, HTML, formula or end of a table cell.

    Args:
        text: any text; other values are converted by `str`.
    """
    line = " ".join(printable(str(text)).split())
    line = re.sub("[&<>]", lambda match: _ENTITIES[match[0]], line)
    return _BLOCK_MARKER.sub(
        lambda match: f"{match[1] or ''}\\{match[2]}", _INLINE.sub(lambda match: f"\\{match[0]}", line)
    )


def code_span(text: object) -> str:
    """Return text as a Markdown code span, on one line.

    Args:
        text: any text; other values are converted by `str`.
    """
    line = " ".join(printable(str(text)).split())
    fence = "`" * (_longest_run(line) + 1)
    space = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(text: str, language: str) -> str:
    """Return text as a fenced Markdown block, whose fence is longer than any run of backticks in the text.

    Args:
        text: any text.
        language: language of the block; not escaped, so it must not be external text.
    """
    text = printable(text)
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def yaml_text(values: object) -> str:
    """Return plain values as a YAML document: no text in them becomes a key, a tag or the end of the document.

    Args:
        values: dicts, lists, strings, numbers, booleans and None.
    """
    return yaml.safe_dump(values, sort_keys=False, width=100).strip()


def html_text(text: object) -> str:
    """Return text for an HTML element or quoted attribute.

    Args:
        text: any text; other values are converted by `str`.
    """
    return html.escape(printable(str(text)))


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
