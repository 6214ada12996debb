"""Rows of tokens: text is joined and cut into whole rows; of every other format an example is a row."""

from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers.utils import logging

from ..core.targets import IGNORE_INDEX
from ..errors import DistillError
from .checks import by_row, check_text
from .formats import TEXT, format_of, make_encode_fn
from .load import Examples

logger = logging.get_logger(__name__)

ROW = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
TWO_VIEWS = Features({**ROW, "view_input_ids": List(Value("int64")), "view_labels": List(Value("int64"))})


def tokenize_dataset(
    documents: Examples,
    tokenizer: Any,
    max_length: int,
    assistant_only: bool | None = None,
    overflow: str = "truncate",
    paraphrase: bool = False,
    where: str = "The source",
    chat_template: str | None = None,
) -> Examples:
    """Rows of at most `max_length` tokens of examples in any format; see `concat_and_chunk` and `tokenize_examples`.

    Raises:
        DistillError: see there; options of conversations for text.
    """
    columns = documents.column_names or list(next(iter(documents)))
    if format_of(columns, where=where, paraphrase=paraphrase) != TEXT:
        return tokenize_examples(
            documents, tokenizer, max_length, assistant_only, overflow, paraphrase, where, chat_template
        )
    if assistant_only:
        raise DistillError("assistant_only is true, but the source is text, which has no turns: leave it out.")
    return concat_and_chunk(documents, tokenizer, max_length, where)


def concat_and_chunk(documents: Examples, tokenizer: Any, max_length: int, where: str = "The source") -> Examples:
    """Rows of exactly `max_length` tokens: documents joined with end-of-text tokens, then cut; the rest is dropped.

    Returns:
        a data set with `input_ids` and `labels`, each row a list of `max_length` ids.

    Raises:
        DistillError: the tokenizer has no end-of-text token, an example has no text, or there is too little text for
            one row.
    """
    if tokenizer.eos_token_id is None:
        raise DistillError("The tokenizer has no eos_token to put between documents: set one.")

    check = by_row(lambda example: {TEXT: check_text(example, TEXT)}, documents, where)

    def cut(batch: dict, indices: list[int]) -> dict:
        texts = [check({TEXT: text}, i)[TEXT] for text, i in zip(batch[TEXT], indices, strict=True)]
        tokens: list[int] = []
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            tokens += [*ids, tokenizer.eos_token_id]
        rows = [tokens[i : i + max_length] for i in range(0, len(tokens) - max_length + 1, max_length)]
        return {"input_ids": rows, "labels": rows}

    rows = documents.with_format(None).map(
        cut,
        batched=True,
        with_indices=True,
        remove_columns=documents.column_names or list(next(iter(documents))),
        features=ROW,
    )
    if next(iter(rows), None) is None:
        count = f"{len(documents)} documents" if isinstance(documents, Dataset) else "its documents"
        raise DistillError(f"{where}: {count} hold fewer than max_length={max_length} tokens in all.")
    return rows


def tokenize_examples(
    documents: Examples,
    tokenizer: Any,
    max_length: int,
    assistant_only: bool | None = None,
    overflow: str = "truncate",
    paraphrase: bool = False,
    where: str = "The source",
    chat_template: str | None = None,
) -> Examples:
    """A row for each example that asks something, of at most `max_length` tokens.

    Args:
        documents: `messages`, `prompt` + `completion`, or `input_ids`.
        tokenizer: the student's.
        max_length: tokens.
        assistant_only: see `make_encode_fn`.
        overflow: what becomes of longer ones: "truncate" keeps their start, "drop" leaves them out.
        paraphrase: also rows of the same completion after `paraphrase`, of which the same leading tokens are asked.
        where: for errors.
        chat_template: see `make_encode_fn`.

    Returns:
        a data set with `input_ids` and `labels`, [S] each; with paraphrases also `view_input_ids` and `view_labels`.

    Raises:
        DistillError: see `make_encode_fn`; or no example asks anything.
    """
    columns = documents.column_names or list(next(iter(documents)))
    features = TWO_VIEWS if paraphrase else ROW
    kind = format_of(columns, where=where, paraphrase=paraphrase)
    encode = by_row(make_encode_fn(kind, tokenizer, assistant_only, paraphrase, chat_template), documents, where)
    other = [c for c in columns if c not in features]
    rows = documents.with_format(None).map(encode, with_indices=True, remove_columns=other, features=features)
    whole = len(rows) if isinstance(rows, Dataset) else None
    if isinstance(rows, Dataset):
        lengths = [pc.list_value_length(rows.data.column(name)) for name in features]
        longer = pc.sum(pc.greater(pc.max_element_wise(*lengths), max_length)).as_py()
        if longer:
            done = "dropped" if overflow == "drop" else "truncated"
            logger.warning(f"{longer} of {whole} examples are longer than max_length={max_length} and are {done}.")
    if overflow == "drop":
        rows = rows.filter(lambda row: all(len(row[name]) <= max_length for name in features))
    else:
        rows = rows.map(lambda row: {name: row[name][:max_length] for name in features}, features=features)
    if paraphrase:
        rows = rows.map(_asked_in_both, features=features)
    before = len(rows) if isinstance(rows, Dataset) else None
    rows = rows.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"][1:]))
    if next(iter(rows), None) is None:
        raise DistillError(
            f"{where}: none of {'its' if whole is None else whole} examples has a target token among its first "
            f"max_length={max_length} tokens: every label is -100, no turn has the role assistant, or the prompts "
            "alone are longer. Check the labels or roles of the data, or raise max_length."
        )
    if isinstance(rows, IterableDataset):
        return rows
    if before != len(rows):
        logger.warning(f"{int(before or 0) - len(rows)} of {before} examples ask nothing and are left out.")
    return rows


def _asked_in_both(row: dict) -> dict[str, list[int]]:
    """The labels of a row and its paraphrase, of which the leading asked tokens that they have in common stay."""
    from trl.data_utils import common_prefix_length

    names = ("labels", "view_labels")
    places = [[i for i, label in enumerate(row[name]) if i and label != IGNORE_INDEX] for name in names]
    asked = [[row[name][i] for i in own] for name, own in zip(names, places, strict=True)]
    count = common_prefix_length(*asked)
    kept = {name: set(own[:count]) for name, own in zip(names, places, strict=True)}
    return {name: [label if i in kept[name] else IGNORE_INDEX for i, label in enumerate(row[name])] for name in names}
