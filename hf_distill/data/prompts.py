"""Prompts, for students that write the completions themselves."""

from typing import Any

from ..errors import DistillError
from .formats import MESSAGES, format_of
from .load import Examples


def prompt_rows(documents: Examples, where: str = "The source") -> Examples:
    """Rows of `prompt` and `completion`, as texts or as lists of messages: of a conversation, its last turn.

    Args:
        documents: `messages`, or `prompt` with or without `completion`, which are returned as they are.
        where: for the error.

    Raises:
        DistillError: another format; a conversation that does not end with a turn of the assistant.
    """
    columns = documents.column_names or list(next(iter(documents)))
    if "prompt" in columns:
        return documents
    kind = format_of(columns, where=where)
    if kind != MESSAGES:
        raise DistillError(
            f"{where} is {kind}, in which nothing says where a prompt ends: the student writes completions of prompts, "
            "so give `messages`, or `prompt` and `completion`."
        )
    return documents.map(_split, remove_columns=["messages"])


def _split(example: dict) -> dict[str, Any]:
    messages = example["messages"]
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise DistillError(f"A conversation must end with an answer of the assistant's; got {messages!r}")
    return {"prompt": messages[:-1], "completion": messages[-1:]}
