"""The rows of a generated data set: prompts joined with their completions."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from ..data.conversations import ASSISTANT
from ..errors import DistillError
from .completion import Completion
from .prompts import REFERENCE, SourceRow
from .reasoning import split_reasoning, starts_inside

REASONING = "reasoning"
COLUMNS = (
    "prompt",
    "completion",
    "source",
    "row",
    "sample",
    "finish_reason",
    "tokens",
    "logprob",
    REASONING,
    REFERENCE,
)


def make_rows(
    sources: Sequence[SourceRow],
    completions: Sequence[Completion],
    reasoning: str,
    tags: tuple[str, str],
    opened: Mapping[int, bool],
) -> list[dict[str, Any]]:
    """Join prompts with their completions.

    Args:
        sources: the prompts; their index is their position.
        completions: the completions.
        reasoning: "keep", "remove" or "column"; see `Generation.reasoning`.
        tags: tags before and after the reasoning.
        opened: index of a prompt -> whether its rendered text ends with the first tag.

    Returns:
        a mapping of columns for each completion. A completion of a conversation is a list of one message.
    """
    by_index = {source.prompt.index: source for source in sources}
    rows = []
    for each in completions:
        source = by_index[each.index]
        is_open = opened.get(each.index, False)
        thoughts, answer = split_reasoning(each.text, tags, is_open)
        if reasoning == "keep":  # the prompt of the data set does not contain the tag that the template adds
            answer = f"{tags[0]}\n{each.text}" if starts_inside(each.text, tags, is_open) else each.text
        is_text = isinstance(source.prompt.content, str)
        row: dict[str, Any] = {
            "prompt": source.prompt.content,
            "completion": answer if is_text else [{"role": ASSISTANT, "content": answer}],
            "source": source.prompt.source,
            "row": source.prompt.row,
            "sample": each.sample,
            "finish_reason": each.finish_reason,
            "tokens": each.tokens,
            "logprob": each.log_prob,
        }
        if reasoning == "column":
            row[REASONING] = thoughts
        if source.reference is not None:
            row[REFERENCE] = source.reference
        rows.append({**{k: v for k, v in source.columns.items() if k not in row}, **row})
    return rows


def column_names(sources: Sequence[SourceRow], reasoning: str, log_probs: bool) -> list[str]:
    """Return the columns that `make_rows` will give, for filters: without the ones that have no values."""
    absent = set[str]() if log_probs else {"logprob"}
    absent |= set[str]() if reasoning == "column" else {REASONING}
    absent |= set[str]() if any(source.reference is not None for source in sources) else {REFERENCE}
    of_sources = dict.fromkeys(name for source in sources for name in source.columns)
    return [*dict.fromkeys([*(name for name in COLUMNS if name not in absent), *of_sources])]


def replaced_columns(sources: Sequence[SourceRow], reasoning: str, added: Collection[str]) -> list[str]:
    """Return the columns of the sources that the data set does not keep, because it has other values under their names.

    Args:
        sources: the prompts.
        reasoning: see `make_rows`.
        added: the columns that filters and the selection may add.
    """
    written = {*COLUMNS, *added} - (set[str]() if reasoning == "column" else {REASONING})
    replaced = dict.fromkeys(
        name
        for source in sources
        for name in source.columns
        if name in written and (name != REFERENCE or source.reference is not None)
    )
    return [*replaced]


def make_table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows as a table: the columns of `COLUMNS` first; a column that a row does not have is null.

    Raises:
        DistillError: a column has values of several types.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    ordered = [*(name for name in COLUMNS if name in names), *(name for name in names if name not in COLUMNS)]
    columns = {}
    for name in ordered:
        try:
            columns[name] = pa.array([row.get(name) for row in rows])
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise DistillError(
                f"The column {name!r} has values of several types ({error}), which one data set cannot hold. Sources "
                "with texts and sources with conversations need separate data sets, or generate.chat: true, which "
                "makes conversations of texts; other columns can be removed from the source."
            ) from None
    return pa.table(columns)
