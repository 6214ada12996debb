"""Prompts for on-policy distillation, where the student generates the completions."""

from datasets import Features

from ..core.prompt_template import fill_template
from ..errors import DistillError
from .checks import UNNAMED_SOURCE, by_row, check_messages
from .conversations import ASSISTANT
from .formats import MESSAGES, TEACHER_PROMPT, format_of
from .json_files import map_exactly
from .load import Examples


def prompt_rows(documents: Examples, where: str = UNNAMED_SOURCE) -> Examples:
    """Return rows of `prompt` and `completion`, as texts or lists of messages.

    The completion of a conversation is its last turn.

    Args:
        documents: rows of `messages`, or of `prompt` with or without `completion`, which are returned unchanged.
        where: name of the source in errors.

    Raises:
        DistillError: the format is another one, or a conversation does not end with a turn of the assistant.
    """
    columns = documents.column_names or list(next(iter(documents)))
    if "prompt" in columns:
        return documents
    kind = format_of(columns, where=where)
    if kind != MESSAGES:
        raise DistillError(
            f"{where} has the format {kind}, which has no prompts. On-policy distillation, and a teacher with another "
            "prompt, need them: use a source with `messages`, or with `prompt` and `completion`."
        )
    split = by_row(_split, documents, where)
    return map_exactly(documents.with_format(None), split, _split_features(documents.features), [MESSAGES])


def with_teacher_prompts(documents: Examples, template: str, where: str = UNNAMED_SOURCE) -> Examples:
    """Return rows with the column `teacher_prompt`, which a template makes of the other columns; see `fill_template`.

    Args:
        documents: rows of `prompt` and `completion`.
        template: text with the names of columns in braces.
        where: name of the source in errors.

    Raises:
        DistillError: there is no prompt, or a row lacks a column of the template.
    """
    columns = documents.column_names or list(next(iter(documents)))
    if "prompt" not in columns:
        raise DistillError(
            f"{where} has the columns {columns}; the teacher's prompt needs the column `prompt`. Use rows of prompt "
            "and completion, or remove the prompt of the teacher."
        )
    fill = by_row(lambda example: {TEACHER_PROMPT.column: fill_template(template, example)}, documents, where)
    features = documents.features
    if features is not None:
        features = Features({**features, TEACHER_PROMPT.column: features["prompt"]})
    return map_exactly(documents.with_format(None), fill, features, [])


def _split_features(features: Features | None) -> Features | None:
    """Return features in which prompts and completions have the type of the messages.

    If `datasets` inferred the type, it would change texts that are JSON.
    """
    if features is None:
        return None
    other = {name: kind for name, kind in features.items() if name != MESSAGES}
    return Features({**other, "prompt": features[MESSAGES], "completion": features[MESSAGES]})


def _split(example: dict) -> dict[str, list[dict]]:
    messages = check_messages(example, MESSAGES)
    if len(messages) < 2 or messages[-1]["role"] != ASSISTANT:
        raise DistillError(
            f"column {MESSAGES}: a conversation must have at least two messages and end with one of the assistant, but "
            f"its roles are {[message['role'] for message in messages]}. Correct the conversation or leave it out"
        )
    return {"prompt": messages[:-1], "completion": messages[-1:]}
