"""Prompts, for students that write the completions themselves."""

from typing import Any

from datasets import Features

from ..errors import DistillError
from .checks import by_row, check_messages
from .conversations import ASSISTANT
from .formats import MESSAGES, format_of
from .json_files import map_exactly
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
    split = by_row(_split, documents, where)
    return map_exactly(documents.with_format(None), split, _split_features(documents.features), [MESSAGES])


def _split_features(features: Features | None) -> Features | None:
    """Prompts and completions have the type of the messages; `datasets` would change texts as it infers another."""
    if features is None:
        return None
    kept = {name: kind for name, kind in features.items() if name != MESSAGES}
    return Features({**kept, "prompt": features[MESSAGES], "completion": features[MESSAGES]})


def _split(example: dict) -> dict[str, Any]:
    messages = check_messages(example, MESSAGES)
    if len(messages) < 2 or messages[-1]["role"] != ASSISTANT:
        raise DistillError(
            f"column {MESSAGES}: a conversation must end with an answer of the assistant's, and a turn before it; its "
            f"roles are {[message['role'] for message in messages]}"
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}
