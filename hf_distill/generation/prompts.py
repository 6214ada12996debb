"""Reads the prompts of data sources, and renders them to token ids for a model in this process."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.checks import check_messages, check_text, check_tools, without_none
from ..data.conversations import ASSISTANT, Conversations
from ..data.roles import check_roles
from ..errors import DistillError
from .completion import Prompt

REFERENCE = "reference"
# Columns that the data set does not keep: it would be of another format, see `format_of`.
_OTHER_FORMATS = ("input_ids", "messages", "prompt", "completion")
_SYSTEM, _USER = "system", "user"


@dataclass(frozen=True)
class SourceRow:
    """A prompt, and what its row has in addition.

    prompt:    the prompt
    reference: the completion of the data, a text; None if it has none
    columns:   the other columns of the row
    """

    prompt: Prompt
    reference: str | None
    columns: dict[str, Any]


def read_source(
    rows: Dataset, source: str, first: int, as_chat: bool = False, numbers: Sequence[int] | None = None
) -> Iterator[SourceRow]:
    """Yield the prompts of a source.

    The prompt of a conversation is everything before its last turn if that is the assistant's, else the conversation.

    Args:
        rows: rows with the column `messages` or `prompt`.
        source: name of the source.
        first: index of the first prompt.
        as_chat: whether a prompt that is a text becomes a user's turn.
        numbers: numbers of the rows in the source; None: counted from 0.

    Raises:
        DistillError: there is no such column, or a row is invalid.
    """
    columns = rows.column_names
    if not {"messages", "prompt"} & {*columns}:
        raise DistillError(
            f"data.{source} has the columns {columns}, and no prompts: use a source with the column `messages` or "
            "`prompt`, or set `column` to the one that holds the prompts."
        )
    for i, row in enumerate(rows):
        number = i if numbers is None else numbers[i]
        try:
            content, reference = _split(row)
            tools = check_tools(row)
        except DistillError as error:
            raise DistillError(f"data.{source}, row {number} (counted from 0), {error}") from error
        if as_chat and isinstance(content, str):
            content = [{"role": _USER, "content": content}]
        others = {k: v for k, v in row.items() if k not in _OTHER_FORMATS}
        yield SourceRow(Prompt(first + i, source, number, content, tools), reference, others)


def _split(row: dict[str, Any]) -> tuple[str | list[dict], str | None]:
    """Return the prompt of a row and its reference completion."""
    if row.get("prompt") is None and ("messages" in row or "prompt" not in row):
        messages = [without_none(message) for message in check_messages(row, "messages")]
        if messages[-1]["role"] == ASSISTANT and len(messages) > 1:
            return messages[:-1], _text(messages[-1:])
        return messages, None
    reference = None if row.get("completion") is None else _text(row["completion"])
    if isinstance(row["prompt"], str):
        if not row["prompt"].strip():
            raise DistillError("column prompt: it is empty. Leave the row out")
        return check_text(row, "prompt"), reference
    if row["prompt"] is None:
        raise DistillError("column prompt: found null, but it needs a text or a list of messages. Leave the row out")
    return [without_none(message) for message in check_messages(row, "prompt")], reference


def _text(completion: object) -> str | None:
    """Return the text of a completion, a text or a list of messages with texts; None for other content."""
    if isinstance(completion, str):
        return completion
    contents = [message.get("content") for message in completion] if isinstance(completion, list) else []
    return "\n".join(contents) if contents and all(isinstance(each, str) for each in contents) else None


def with_system_prompt(prompt: Prompt, system_prompt: str | None) -> Prompt:
    """Return a prompt with a system message, if it is a conversation without one.

    Raises:
        DistillError: the prompt is a text.
    """
    if system_prompt is None:
        return prompt
    if isinstance(prompt.content, str):
        raise DistillError(
            f"generate.system_prompt needs conversations, and the prompts of data.{prompt.source} are texts: set "
            "generate.chat to true to send them as a user's turn, or remove system_prompt."
        )
    if prompt.content[0]["role"] == _SYSTEM:
        return prompt
    return replace(prompt, content=[{"role": _SYSTEM, "content": system_prompt}, *prompt.content])


class PromptRenderer:
    """Renders prompts to texts and token ids with the tokenizer of the model that completes them.

    Args:
        tokenizer: the tokenizer.
        chat_template: Jinja source of the template for conversations; None: that of the tokenizer.
        variables: further variables of the template, such as enable_thinking.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        variables: Mapping[str, object] | None = None,
    ):
        self.tokenizer, self._chat_template, self._variables = tokenizer, chat_template, variables or {}
        self._conversations: Conversations | None = None

    def text(self, prompt: Prompt) -> str:
        """Return the text that the model continues.

        Raises:
            DistillError: there is no chat template, it cannot render the prompt, it has no generation prompt, or it
                does not read a variable.
        """
        if isinstance(prompt.content, str):
            return prompt.content
        if self._conversations is None:
            self._conversations = Conversations(self.tokenizer, self._chat_template)
            try:
                self._conversations.check_variables(self._variables)
            except DistillError as error:
                raise DistillError(f"generate.chat_template_kwargs: {error}.") from error
        conversations = self._conversations
        where = f"data.{prompt.source}, row {prompt.row} (counted from 0)"
        try:
            check_roles(prompt.content, conversations.chat_template, "prompt")
            messages = conversations.normalize(prompt.content)
            text, without = (
                conversations.render(messages, prompt.tools, add_generation_prompt, self._variables)
                for add_generation_prompt in (True, False)
            )
            if text == without and messages[-1]["role"] != ASSISTANT:
                raise DistillError(
                    "the chat template renders no generation prompt, so the model would not begin an answer: set "
                    "data.chat_template to a template that uses add_generation_prompt"
                )
        except DistillError as error:
            raise DistillError(f"{where}: {error}") from error
        return text

    def ids(self, prompt: Prompt) -> list[int]:
        """Return the token ids that the model continues."""
        text = self.text(prompt)
        is_rendered = not isinstance(prompt.content, str)  # a template writes the special tokens
        ids = self.tokenizer(text, add_special_tokens=not is_rendered, verbose=False)["input_ids"]
        return _without_final_eos(ids, self.tokenizer)


def _without_final_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ids without the end-of-text token that some tokenizers append to every text."""
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids
