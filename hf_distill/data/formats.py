"""Formats of examples, told by their columns, and how one example becomes a row of tokens."""

import json
from collections.abc import Callable, Sequence
from typing import Any

from transformers.utils import logging

from ..errors import DistillError, need
from ..signals import IGNORE_INDEX

logger = logging.get_logger(__name__)

TEXT, MESSAGES, COMPLETION, TOKENS = "text", "messages", "completion", "tokens"
PARAPHRASE = "paraphrase"
_NEEDED = {TOKENS: {"input_ids"}, MESSAGES: {"messages"}, COMPLETION: {"prompt", "completion"}, TEXT: {"text"}}
_KNOWN = (
    "text; messages; prompt and completion; input_ids (with labels, completion_mask or assistant_masks, or with none)"
)


def format_of(
    columns: Sequence[str], column: str | None = None, where: str = "The source", paraphrase: bool = False
) -> str:
    """Which format the columns are: `input_ids` counts before `messages`, `prompt` + `completion` and `text`.

    Args:
        columns: of the data set.
        column: the column that holds the text; None: told by the columns.
        where: for the error.
        paraphrase: whether it must have `paraphrase`, another prompt before the same completion.

    Returns:
        "tokens", "messages", "completion" or "text".

    Raises:
        DistillError: no such column, none of the formats, or no paraphrases of prompts.
    """
    if column is not None:
        if column not in columns:
            raise DistillError(f"{where} has no column {column!r}; it has {list(columns)}. Set `column`.")
        return TEXT
    for kind, needed in _NEEDED.items():
        if needed <= set(columns):
            if paraphrase and (kind != COMPLETION or PARAPHRASE not in columns):
                raise DistillError(
                    f"{where} is read as {kind} and has the columns {list(columns)}: paraphrases stand in a column "
                    "`paraphrase` beside `prompt` and `completion`. Add it, or use a view without paraphrase."
                )
            return kind
    raise DistillError(
        f"{where} has the columns {list(columns)}, which are none of the four formats: {_KNOWN}. Rename columns, or "
        "name the one that holds the text: `column`."
    )


def encoder(
    kind: str, tokenizer: Any, assistant_only: bool | None = None, paraphrase: bool = False
) -> Callable[[dict], dict[str, list[int]]]:
    """How an example of a format becomes `{"input_ids": [S], "labels": [S]}`, -100 where nothing is asked.

    Args:
        kind: "messages", "completion" or "tokens"; see `format_of`.
        tokenizer: with a chat template where there are conversations.
        assistant_only: ask the turns that the template marks with {% generation %} alone; None: where it marks any.
        paraphrase: of completions, also `view_input_ids` and `view_labels`: the completion after its other prompt.

    Raises:
        DistillError: a template without marks, or no template.
    """
    if kind == TOKENS:
        return _from_tokens
    need("trl", "trl", "Reading conversations and completions")
    from trl.chat_template_utils import has_generation_markers

    template = getattr(tokenizer, "chat_template", None)
    marked = template is not None and has_generation_markers(template)
    if kind == MESSAGES and template is None:
        raise DistillError("The source has conversations, but the tokenizer has no chat_template: set one.")
    if assistant_only and not marked:
        raise DistillError(
            "assistant_only is true, but the tokenizer's chat template marks no turns with {% generation %}. Give it a "
            "template that does (trl.chat_template_utils.get_training_chat_template has some), or leave the option out."
        )
    masked = marked if assistant_only is None else assistant_only
    from_prompts = _from_two_prompts if paraphrase else _from_completion
    from_example = _from_messages if kind == MESSAGES else from_prompts
    return lambda example: from_example(example, tokenizer, masked)


def _from_tokens(example: dict) -> dict[str, list[int]]:
    ids = example["input_ids"]
    if example.get("labels") is not None:
        labels = example["labels"]
        if len(labels) != len(ids):
            raise DistillError(f"An example has {len(ids)} input_ids and {len(labels)} labels: it needs one of each.")
        return {"input_ids": ids, "labels": labels}
    masks = [example[name] for name in ("completion_mask", "assistant_masks") if example.get(name) is not None]
    return _row(ids, *masks)


def _from_messages(example: dict, tokenizer: Any, masked: bool) -> dict[str, list[int]]:
    found = _chat(example, example["messages"], tokenizer, return_assistant_tokens_mask=masked)
    return _row(found["input_ids"], *([found["assistant_masks"]] if masked else []))


def _from_completion(example: dict, tokenizer: Any, masked: bool) -> dict[str, list[int]]:
    from trl.data_utils import common_prefix_length, is_conversational

    prompt, completion, masks = example["prompt"], example["completion"], []
    if is_conversational(example):
        alone = _chat(example, prompt, tokenizer, add_generation_prompt=True)["input_ids"]
        whole = _chat(example, prompt + completion, tokenizer, return_assistant_tokens_mask=masked)
        masks = [whole["assistant_masks"]] if masked else []
    else:
        end = tokenizer.eos_token or ""
        alone = tokenizer(prompt)["input_ids"]
        whole = tokenizer(prompt + completion + ("" if completion.endswith(end) else end))
    ids = whole["input_ids"]
    start = common_prefix_length(alone, ids)
    if start < len(alone):
        logger.warning_once(
            f"The tokens of a prompt change where its completion follows: {tokenizer.decode(alone[start:])!r} is "
            "asked as part of the completion. End prompts where a token ends. Said once."
        )
    return _row(ids, [0] * start + [1] * (len(ids) - start), *masks)


def _from_two_prompts(example: dict, tokenizer: Any, masked: bool) -> dict[str, list[int]]:
    prompt, other = example["prompt"], example[PARAPHRASE]
    if type(prompt) is not type(other):
        raise DistillError(
            f"A paraphrase is a text where its prompt is one, and a list of messages where that is; got {other!r} for "
            f"{prompt!r}. Give every example one, or leave the example out."
        )
    view = _from_completion(example | {"prompt": other}, tokenizer, masked)
    own = _from_completion(example, tokenizer, masked)
    return own | {"view_input_ids": view["input_ids"], "view_labels": view["labels"]}


def _chat(example: dict, messages: list[dict], tokenizer: Any, **options) -> Any:
    if getattr(tokenizer, "chat_template", None) is None:
        raise DistillError("The source has conversations, but the tokenizer has no chat_template: set one.")
    if not messages or not all(isinstance(m, dict) and "role" in m for m in messages):
        raise DistillError(f"A conversation is a list of {{role, content}}; got {messages!r}")
    tools = example.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return tokenizer.apply_chat_template(messages, tools=tools or None, tokenize=True, return_dict=True, **options)


def _row(ids: list[int], *masks: list[int]) -> dict[str, list[int]]:
    for mask in masks:
        if len(mask) != len(ids):
            raise DistillError(f"An example has {len(ids)} input_ids and a mask of {len(mask)}: it needs one of each.")
    asked = zip(*masks, strict=True) if masks else ((True,) for _ in ids)
    return {
        "input_ids": ids,
        "labels": [token if all(bits) else IGNORE_INDEX for token, bits in zip(ids, asked, strict=True)],
    }
