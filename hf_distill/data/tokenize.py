"""Tokenizes data sets: text is concatenated and cut into full rows; in every other format an example is a row."""

from collections.abc import Sequence
from functools import partial

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.defaults import OVERFLOW
from ..core.row_values import ORIGIN, WEIGHT, check_weight, origin_index
from ..core.targets import IGNORE_INDEX
from ..errors import DistillError
from .checks import UNNAMED_SOURCE, by_row, check_text
from .formats import TEXT, TOKENS, OtherTokenizer, SecondPrompt, format_of, make_encode_fn
from .load import Examples

logger = logging.get_logger(__name__)

ROW_FEATURES = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})
ROW_VALUES = {WEIGHT: Value("float32"), ORIGIN: Value("int64")}


def tokenize_dataset(
    documents: Examples,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_only: bool | None = None,
    overflow: str = OVERFLOW,
    second_prompt: SecondPrompt | None = None,
    where: str = UNNAMED_SOURCE,
    chat_template: str | None = None,
    other_tokenizers: Sequence[OtherTokenizer] = (),
) -> Examples:
    """Tokenize examples of any format to rows of at most `max_length` tokens.

    Text is concatenated and cut by `concat_and_chunk`; the other formats are tokenized by `tokenize_examples`, which
    describes the arguments.

    Args:
        documents: `text`, `messages`, `prompt` + `completion`, or `input_ids`.
        tokenizer: the student's tokenizer.
        max_length: maximum tokens of a row.
        assistant_only: whether only the assistant's turns of conversations are target tokens; None: if the chat
            template marks them. Not for text.
        overflow: see `tokenize_examples`.
        second_prompt: see `tokenize_examples`.
        where: name of the source in errors.
        chat_template: see `tokenize_examples`.
        other_tokenizers: see `tokenize_examples`.

    Returns:
        a data set with `input_ids` and `labels`, [S] each.

    Raises:
        DistillError: see these functions; or `assistant_only` is set for text.
    """
    columns = documents.column_names or list(next(iter(documents)))
    if format_of(columns, where=where, second_prompt=second_prompt) != TEXT:
        return tokenize_examples(
            documents,
            tokenizer,
            max_length,
            assistant_only,
            overflow,
            second_prompt,
            where,
            chat_template,
            other_tokenizers,
        )
    if ignored := [column for column in ROW_VALUES if column in columns]:
        raise DistillError(
            f"{where} is text, whose documents are joined and cut into rows, and it has the column "
            f"{', '.join(ignored)}, which belongs to a row: use rows of prompt and completion, or messages, or remove "
            "the column."
        )
    if assistant_only:
        raise DistillError("assistant_only is true, but the source is text, which has no turns: remove assistant_only.")
    return concat_and_chunk(documents, tokenizer, max_length, where)


def concat_and_chunk(
    documents: Examples, tokenizer: PreTrainedTokenizerBase, max_length: int, where: str = UNNAMED_SOURCE
) -> Examples:
    """Concatenate documents with EOS tokens between them and cut them into rows of exactly `max_length` tokens.

    The remainder of each batch of documents is dropped.

    Args:
        documents: examples with `text`.
        tokenizer: the student's tokenizer, which has an EOS token.
        max_length: tokens of a row.
        where: name of the source in errors.

    Returns:
        a data set with `input_ids` and `labels`, [max_length] each.

    Raises:
        DistillError: the tokenizer has no EOS token, an example has no text, or there is too little text for one row.
    """
    if tokenizer.eos_token_id is None:
        raise DistillError("The tokenizer has no eos_token to put between documents: set `tokenizer.eos_token`.")

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
        features=ROW_FEATURES,
    )
    if next(iter(rows), None) is None:
        count = f"{len(documents)} documents" if isinstance(documents, Dataset) else "its documents"
        raise DistillError(
            f"{where}: {count} hold fewer than max_length={max_length} tokens in total. Use more text, or lower "
            "max_length."
        )
    return rows


def tokenize_examples(
    documents: Examples,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    assistant_only: bool | None = None,
    overflow: str = OVERFLOW,
    second_prompt: SecondPrompt | None = None,
    where: str = UNNAMED_SOURCE,
    chat_template: str | None = None,
    other_tokenizers: Sequence[OtherTokenizer] = (),
) -> Examples:
    """Tokenize each example that has target tokens to a row of at most `max_length` tokens.

    Args:
        documents: `messages`, `prompt` + `completion`, or `input_ids`; each with or without `weight`, a factor of the
            losses of the row, and `origin`, the author of its target tokens.
        tokenizer: the student's tokenizer.
        max_length: maximum tokens of a row.
        assistant_only: see `make_encode_fn`.
        overflow: treatment of longer examples: "truncate" keeps their start, "drop" leaves them out.
        second_prompt: also tokenize the completion after another prompt; only the leading target tokens that both rows
            have in common remain targets.
        where: name of the source in errors.
        chat_template: see `make_encode_fn`.
        other_tokenizers: teachers with other tokenizers, for which conversations, and prompts with completions, become
            separate rows, which are not truncated as the student's are. A teacher reads examples of `input_ids`,
            and of conversations all of whose tokens are targets, as the student's text.

    Returns:
        a data set with `input_ids` and `labels`, [S] each; with a second prompt, or another tokenizer, also its ids and
        labels. `weight` stays, and `origin` becomes its index in `ORIGINS`.

    Raises:
        DistillError: see `make_encode_fn`; a weight or an origin is invalid; or no example has a target token.
    """
    columns = documents.column_names or list(next(iter(documents)))
    kind = format_of(columns, where=where, second_prompt=second_prompt)
    if kind == TOKENS or assistant_only is False:
        other_tokenizers = ()
    of_teachers = [name for each in other_tokenizers for name in each.columns]
    second = () if second_prompt is None or second_prompt.columns[0] in of_teachers else second_prompt.columns
    limited = [*ROW_FEATURES, *second]  # columns of at most `max_length` tokens
    features = Features({name: List(Value("int64")) for name in (*limited, *of_teachers)})
    features.update({column: kind for column, kind in ROW_VALUES.items() if column in columns})
    read = make_encode_fn(kind, tokenizer, assistant_only, second_prompt, chat_template, other_tokenizers)
    encode = by_row(lambda example: {**_row_values(example), **read(example)}, documents, where)
    other = [column for column in columns if column not in features]
    rows = documents.with_format(None).map(encode, with_indices=True, remove_columns=other, features=features)
    total = len(rows) if isinstance(rows, Dataset) else None
    if isinstance(rows, Dataset):
        lengths = [pc.list_value_length(rows.data.column(name)) for name in limited]
        longer = pc.sum(pc.greater(pc.max_element_wise(*lengths), max_length)).as_py()
        if longer:
            action = "dropped" if overflow == "drop" else "truncated"
            logger.warning(f"{longer} of {total} examples are longer than max_length={max_length} and are {action}.")
    if overflow == "drop":
        rows = rows.filter(lambda row: all(len(row[name]) <= max_length for name in limited))
    else:
        rows = rows.map(lambda row: {name: row[name][:max_length] for name in limited}, features=features)
    if second:
        rows = rows.map(partial(_common_targets, names=("labels", second[1])), features=features)
    before = len(rows) if isinstance(rows, Dataset) else None
    rows = rows.filter(lambda row: any(label != IGNORE_INDEX for label in row["labels"][1:]))
    if next(iter(rows), None) is None:
        raise DistillError(
            f"{where}: none of {'its' if total is None else total} examples has a target token among its first "
            f"max_length={max_length} tokens: every label is -100, no turn has the role assistant, or the prompts "
            "alone are longer. Check the labels or roles of the data, or raise max_length."
        )
    if isinstance(rows, IterableDataset):
        return rows
    if before != len(rows):
        logger.warning(f"{int(before or 0) - len(rows)} of {before} examples have no target tokens and are left out.")
    return rows


def _row_values(example: dict) -> dict[str, float]:
    """Return the columns `weight` and `origin` of an example, if it has them; the origin as an index."""
    checks = {WEIGHT: check_weight, ORIGIN: origin_index}
    return {column: check(example[column]) for column, check in checks.items() if column in example}


def _common_targets(row: dict, names: tuple[str, str]) -> dict[str, list[int]]:
    """Return the labels of a row and of its second prompt, restricted to the leading target tokens that they share."""
    from trl.data_utils import common_prefix_length

    positions = {name: [i for i, label in enumerate(row[name]) if i and label != IGNORE_INDEX] for name in names}
    count = common_prefix_length(*([row[name][i] for i in positions[name]] for name in names))
    common = {name: set(positions[name][:count]) for name in names}
    return {name: [label if i in common[name] else IGNORE_INDEX for i, label in enumerate(row[name])] for name in names}
