"""The rows that filters read: one completion of a prompt with its columns. Imports no torch.

| column | content |
|---|---|
| `prompt` | text, or a list of messages |
| `completion` | text, or a list of messages |
| `source` | name of the data source |
| `row` | number of the prompt in its source (optional; without it, prompts with one text are one prompt) |
| `sample` | number of the completion among those of the prompt |
| `finish_reason` | "stop", or "length" for a completion that was cut off |
| `tokens` | number of tokens of the completion |
| `logprob` | mean log-probability of the completion's tokens under the teacher, in nats per token; None if unknown |

All other columns are those of the source, such as a reference answer, and the scores that filters add.
"""

from collections.abc import Hashable, Mapping
from typing import TypeAlias

from ..errors import DistillError, did_you_mean

Row: TypeAlias = Mapping[str, object]


def column(row: Row, name: str, user: str) -> object:
    """Return a column of a row.

    Args:
        row: the row.
        name: name of the column.
        user: the filter that reads it, for the message.

    Raises:
        DistillError: the row has no such column.
    """
    if name not in row:
        raise DistillError(f"{user} reads the column {name!r}, which the rows do not have{did_you_mean(name, row)}")
    return row[name]


def prompt_text(row: Row) -> str:
    """Return the text of the prompt; of messages, their contents."""
    return _text(column(row, "prompt", "A filter"))


def completion_text(row: Row) -> str:
    """Return the text of the completion; of messages, their contents."""
    return _text(column(row, "completion", "A filter"))


def prompt_key(row: Row) -> Hashable:
    """Return a value that all completions of one prompt share."""
    return (row.get("source"), row.get("row"), prompt_text(row))


def _text(value: object) -> str:
    """Return a text as it is, and the texts of messages or of the parts of a message, joined by line breaks."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        return _text(value.get("content") or value.get("text"))
    return "\n".join(filter(None, map(_text, value))) if isinstance(value, list | tuple) else ""
