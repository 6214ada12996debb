"""Validation of examples, row by row: an error names the source, the row and the column."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset

from ..core.targets import IGNORE_INDEX
from ..errors import DistillError
from .roles import SHAREGPT_HINT

_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
# Columns that the formats in `formats` read; all others are ignored.
EXAMPLE_COLUMNS = ("input_ids", "labels", *_MASKS, "messages", "tools", "prompt", "completion", "paraphrase", "text")
UNNAMED_SOURCE = "The source"  # subject of an error
_MAX_SHOWN_CHARS = 60  # of a value in an error


def by_row(
    function: Callable[[dict], dict], documents: Dataset | IterableDataset, where: str
) -> Callable[[dict, int], dict]:
    """Wrap a function for `map(with_indices=True)` so that its errors name the source and the row, counted from 0.

    Args:
        function: maps one example.
        documents: the data set that it is mapped over; for a selection, errors name the row of the original data set.
        where: name of the source in errors.
    """
    indices = getattr(documents, "_indices", None)

    def numbered(example: dict, index: int) -> dict:
        try:
            return function(example)
        except DistillError as error:
            row = index if indices is None else indices.column(0)[index].as_py()
            raise DistillError(f"{where}, row {row} (counted from 0), {error}") from error

    return numbered


@contextmanager
def naming(column: str) -> Iterator[None]:
    """Prefix errors that are raised within the block with the column."""
    try:
        yield
    except DistillError as error:
        raise DistillError(f"column {column}: {error}") from error


def check_text(example: dict, column: str) -> str:
    """Return the text in a column.

    Raises:
        DistillError: the value is no text.
    """
    value = example.get(column)
    if not isinstance(value, str):
        raise _wrong_value(column, value, "a text (string)")
    return value


def check_messages(example: dict, column: str) -> list[dict]:
    """Return the messages in a column.

    Raises:
        DistillError: the value is no list of `{"role": text, "content": text or list of text parts}`, or the list is
            empty. A message with `tool_calls` needs no content.
    """
    messages = example.get(column)
    if not isinstance(messages, list) or not messages:
        raise _wrong_value(column, messages, "a list of messages {role, content}")
    for index, message in enumerate(messages):
        entry = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise _wrong_value(entry, message, "a message {role, content}")
        if not isinstance(message.get("role"), str):
            if "from" in message and "value" in message:
                raise _wrong_value(entry, message, f"a message {{role, content}}. {SHAREGPT_HINT}")
            raise _wrong_value(f"{entry}.role", message.get("role"), "a text (string)")
        content, calls = message.get("content"), message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise _wrong_value(f"{entry}.tool_calls", calls, "a list of calls")
        if isinstance(content, list):
            _check_parts(content, f"{entry}.content")
        elif not isinstance(content, str) and not (content is None and calls):
            raise _wrong_value(f"{entry}.content", content, "a text (string)")
    return messages


def _check_parts(parts: list, column: str) -> None:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong_value(column, part, 'a part {"type": "text", "text": ...}; images and audio are not supported')


def check_tools(example: dict) -> list | None:
    """Return the JSON schemas of functions in the column `tools`, a list or its JSON text; None if there are none.

    Keys whose value is null are left out of a list, because Arrow fills absent keys with null.

    Raises:
        DistillError: the value is no list of mappings.
    """
    tools = without_none(example.get("tools"))
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DistillError(f"column tools: {_shorten(tools)} is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _wrong_value("tools", tools, "a list of JSON schemas of functions")
    return tools


def without_none(value: object) -> Any:
    """Return a value without the keys of its mappings whose value is None."""
    if isinstance(value, dict):
        return {key: without_none(inner) for key, inner in value.items() if inner is not None}
    return [without_none(inner) for inner in value] if isinstance(value, list) else value


def check_tokens(example: dict, vocab_size: int) -> tuple[list[int], list[int] | None, list[list[int]]]:
    """Return the token ids [S] of a row, its labels [S] or None, and its target masks [S], all without padding.

    Padding is the part of the row at either end that `attention_mask` hides.

    Args:
        example: a row with `input_ids` and optionally `labels`, `attention_mask`, `completion_mask` and
            `assistant_masks`.
        vocab_size: V; ids are below it.

    Raises:
        DistillError: a column is no list of integers, the lengths differ, or an id is not in the vocabulary.
    """
    ids = _check_integers(example, "input_ids", range(vocab_size), "integers that are token ids of the tokenizer,")
    count = len(ids)
    labels = None
    if example.get("labels") is not None:
        labels = _check_integers(
            example, "labels", range(vocab_size), "integers that are -100 or token ids of the tokenizer,", count
        )
    masks = {
        name: _check_integers(example, name, range(2), "0 and 1", count)
        for name in _MASKS
        if example.get(name) is not None
    }
    start, end = _visible_span(masks.pop("attention_mask", [1] * count))
    return ids[start:end], labels and labels[start:end], [mask[start:end] for mask in masks.values()]


def _check_integers(example: dict, column: str, allowed: range, needs: str, count: int | None = None) -> list[int]:
    values = example.get(column)
    if not isinstance(values, list):
        raise _wrong_value(column, values, f"a list of {needs}")
    for index, value in enumerate(values):
        is_allowed = value in allowed or (column == "labels" and value == IGNORE_INDEX)
        if not (is_allowed and isinstance(value, int)) or (isinstance(value, bool) and len(allowed) > 2):
            raise _wrong_value(f"{column}[{index}]", value, needs + f" from 0 to {allowed[-1]}")
    if count is not None and len(values) != count:
        raise DistillError(
            f"column {column}: it has {len(values)} values for {count} input_ids. It needs one value for each."
        )
    return values


def _visible_span(mask: list[int]) -> tuple[int, int]:
    """Return the start and end of the tokens of a row that its attention mask does not hide."""
    if 1 not in mask:
        return 0, 0
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[start:end]:
        raise DistillError(
            "column attention_mask: it hides tokens between visible tokens; it may only hide padding at the ends. "
            "Remove those tokens from the row, or set their `labels` to -100 so that they are no targets."
        )
    return start, end


def _wrong_value(column: str, value: object, needs: str) -> DistillError:
    return DistillError(f"column {column}: found {_shorten(value)}, but it needs {needs}.")


def _shorten(value: object) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[:_MAX_SHOWN_CHARS]}..."
