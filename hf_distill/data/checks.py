"""What an example must hold, checked row by row: an error names the source, the row and the column."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from datasets import Dataset, IterableDataset

from ..core.targets import IGNORE_INDEX
from ..errors import DistillError
from .roles import SHAREGPT_HINT

_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
# Columns that the formats of `formats` read; others have no meaning here.
EXAMPLE_COLUMNS = ("input_ids", "labels", *_MASKS, "messages", "tools", "prompt", "completion", "paraphrase", "text")
_SHOWN = 60  # characters of a value that an error shows


def by_row(
    function: Callable[[dict], dict], documents: Dataset | IterableDataset, where: str
) -> Callable[[dict, int], dict]:
    """A function of an example and its index, for `map(with_indices=True)`, whose errors name the row, from 0.

    Args:
        function: of one example.
        documents: that it is mapped over; of a selection, the row is that of the data set selected from.
        where: the source, for the error.
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
    """Errors of the block name the column."""
    try:
        yield
    except DistillError as error:
        raise DistillError(f"column {column}: {error}") from error


def check_text(example: dict, column: str) -> str:
    """The text in a column.

    Raises:
        DistillError: it is no text.
    """
    value = example.get(column)
    if not isinstance(value, str):
        raise _wrong(column, value, "a text")
    return value


def check_messages(example: dict, column: str) -> list[dict]:
    """The messages in a column.

    Raises:
        DistillError: they are no list of `{"role": text, "content": text or list of text parts}`, or the list is empty.
            A message with `tool_calls` needs no content.
    """
    messages = example.get(column)
    if not isinstance(messages, list) or not messages:
        raise _wrong(column, messages, "a list of messages {role, content}")
    for index, message in enumerate(messages):
        place = f"{column}[{index}]"
        if not isinstance(message, dict):
            raise _wrong(place, message, "a message {role, content}")
        if not isinstance(message.get("role"), str):
            if "from" in message and "value" in message:
                raise _wrong(place, message, f"a message {{role, content}}. {SHAREGPT_HINT}")
            raise _wrong(f"{place}.role", message.get("role"), "a text")
        content, calls = message.get("content"), message.get("tool_calls")
        if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
            raise _wrong(f"{place}.tool_calls", calls, "a list of calls")
        if isinstance(content, list):
            _check_parts(content, f"{place}.content")
        elif not isinstance(content, str) and not (content is None and calls):
            raise _wrong(f"{place}.content", content, "a text")
    return messages


def _check_parts(parts: list, place: str) -> None:
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise _wrong(place, part, 'a part {"type": "text", "text": ...}; images and audio are not read here')


def check_tools(example: dict) -> list | None:
    """The JSON schemas in a column `tools`, which may be JSON; None where there are none.

    Raises:
        DistillError: they are no list of mappings.
    """
    tools = example.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise DistillError(f"column tools: {_shown(tools)} is not JSON: {error}") from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise _wrong("tools", tools, "a list of functions' JSON schemas")
    return tools


def check_tokens(example: dict, vocabulary: int) -> tuple[list[int], list[int] | None, list[list[int]]]:
    """Token ids [S] of a row, its labels [S] if it has any, and its masks [S] of targets; without padding.

    Padding is what `attention_mask` hides at either end of the row.

    Args:
        example: with `input_ids`, and perhaps `labels`, `attention_mask`, `completion_mask` and `assistant_masks`.
        vocabulary: ids are below.

    Raises:
        DistillError: they are no lists of whole numbers, have different lengths, or hold ids that do not exist.
    """
    ids = _numbers(example, "input_ids", range(vocabulary), "whole numbers, ids of the tokenizer's")
    count = len(ids)
    labels = None
    if example.get("labels") is not None:
        labels = _numbers(example, "labels", range(vocabulary), "whole numbers, ids of the tokenizer's or -100", count)
    masks = {
        name: _numbers(example, name, range(2), "0 and 1", count) for name in _MASKS if example.get(name) is not None
    }
    start, end = _visible(masks.pop("attention_mask", [1] * count))
    return ids[start:end], labels and labels[start:end], [mask[start:end] for mask in masks.values()]


def _numbers(example: dict, column: str, allowed: range, needs: str, count: int | None = None) -> list[int]:
    values = example.get(column)
    if not isinstance(values, list):
        raise _wrong(column, values, f"a list of {needs}")
    for place, value in enumerate(values):
        fits = value in allowed or (column == "labels" and value == IGNORE_INDEX)
        if not (fits and isinstance(value, int)) or (isinstance(value, bool) and len(allowed) > 2):
            raise _wrong(f"{column}[{place}]", value, needs + f" from 0 to {allowed[-1]}")
    if count is not None and len(values) != count:
        raise DistillError(
            f"column {column}: there are {len(values)} values and {count} input_ids. It needs one of each."
        )
    return values


def _visible(mask: list[int]) -> tuple[int, int]:
    """Where the tokens of a row begin and end that its mask does not hide."""
    if 1 not in mask:
        return 0, 0
    start, end = mask.index(1), len(mask) - mask[::-1].index(1)
    if 0 in mask[start:end]:
        raise DistillError(
            "column attention_mask: it hides tokens between others, and rows are read without gaps. Remove those "
            "tokens from the row, or keep them from being targets by `labels` of -100."
        )
    return start, end


def _wrong(place: str, value: Any, needs: str) -> DistillError:
    return DistillError(f"column {place}: found {_shown(value)}, and it needs {needs}.")


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
