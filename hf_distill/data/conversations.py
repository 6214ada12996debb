"""Conversations as tokens: a chat template renders them, and the assistant's turns become target tokens."""

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..errors import DistillError, require_package

logger = logging.get_logger(__name__)

ASSISTANT = "assistant"
Span = tuple[int, int]  # characters of a rendered conversation, the end excluded
_PROBE = "What is 2 + 2?"


class Conversations:
    """Turns conversations into tokens with one chat template.

    Assistant turns are those that the template marks with `{% generation %}`. In a template without marks, an assistant
    turn is what rendering the conversation up to and including the turn adds to rendering it up to the turn with a
    generation prompt: the characters that follow the generation prompt, end-of-turn tokens included.

    Args:
        tokenizer: the student's.
        chat_template: Jinja source; None: the tokenizer's own.

    Raises:
        DistillError: there is no chat template.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        require_package("trl", "trl", "Reading conversations")
        from trl.chat_template_utils import has_generation_markers

        self.tokenizer = tokenizer
        self.chat_template: Any = chat_template or getattr(tokenizer, "chat_template", None)
        if isinstance(self.chat_template, dict):  # several templates by name
            self.chat_template = self.chat_template.get("default")
        if self.chat_template is None:
            raise DistillError(
                "The source has conversations, but the tokenizer has no chat_template. Set `data.chat_template` in a "
                "recipe, or `tokenizer.chat_template`."
            )
        self.has_marks = has_generation_markers(self.chat_template)
        self.takes_parts = self._takes_parts()

    def encode(
        self,
        messages: Sequence[dict],
        tools: Any = None,
        first: int = 0,
        assistant_only: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Token ids [S] of a conversation, and 1 for each target token among them [S].

        Args:
            messages: `{"role": ..., "content": ...}` each.
            tools: JSON schemas of functions, for the template.
            first: index of the first message whose tokens may be targets; earlier ones are the prompt.
            assistant_only: target the assistant's turns alone; otherwise every token from message `first` on.

        Raises:
            DistillError: the template refuses the conversation, or renders a prefix of it differently than inside the
                whole conversation.
        """
        messages = self.plain(messages)
        if assistant_only and self.has_marks and not first:
            return self._encode_marked(messages, tools)
        text = self.render(messages, tools)
        spans = [(0, len(text))]
        if first:
            spans = [(self._prefix_length(text, messages[:first], tools, True), len(text))]
        if assistant_only and not self.has_marks:
            turns = [i for i in range(first, len(messages)) if messages[i]["role"] == ASSISTANT]
            spans = [self._turn(text, messages, i, tools) for i in turns]
        ids, mask = self._tokens(text, spans)
        if assistant_only and self.has_marks:
            mask = [a and b for a, b in zip(mask, self._encode_marked(messages, tools)[1], strict=True)]
        return ids, mask

    def render(self, messages: Sequence[dict], tools: Any = None, add_generation_prompt: bool = False) -> str:
        """The text of a conversation.

        Raises:
            DistillError: the template refuses the conversation.
        """
        return self._apply(messages, tools, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _apply(self, messages: Sequence[dict], tools: Any, **options) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tools=tools or None, chat_template=self.chat_template, **options
            )
        except Exception as error:  # a template is a program and may raise any exception
            raise DistillError(
                f"the chat template cannot render the conversation: {type(error).__name__}: {error}"
            ) from error

    def _encode_marked(self, messages: Sequence[dict], tools: Any) -> tuple[list[int], list[int]]:
        encoded = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], encoded["assistant_masks"]

    def _turn(self, text: str, messages: Sequence[dict], index: int, tools: Any) -> Span:
        """Where message `index` is in the text of the whole conversation, generation prompt excluded."""
        if not index:
            raise DistillError(
                f"the conversation begins with an assistant's turn, which has no prompt. {self._ways_out()}"
            )
        start = self._prefix_length(text, messages[:index], tools, True)
        end = len(text)
        if index + 1 < len(messages):
            end = self._prefix_length(text, messages[: index + 1], tools, False)
        return start, end

    def _prefix_length(self, text: str, messages: Sequence[dict], tools: Any, add_generation_prompt: bool) -> int:
        prefix = self.render(messages, tools, add_generation_prompt)
        if not text.startswith(prefix):
            raise DistillError(
                f"the chat template renders the first {len(messages)} messages differently on their own than inside "
                f"the whole conversation, so the tokens of the assistant's turns cannot be located. {self._ways_out()}"
            )
        return len(prefix)

    def _ways_out(self) -> str:
        from .training_templates import matching_template

        name = matching_template(self.tokenizer, self.chat_template)
        known = f" ({name!r} renders the same text)" if name else ""
        return (
            "Either set `chat_template` to a template that marks the assistant's turns with {% generation %}"
            f"{known}, or train on all tokens of the conversation with `assistant_only: false`"
        )

    def _tokens(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Token ids of a text, and 1 for each token that overlaps one of the spans."""
        if not getattr(self.tokenizer, "is_fast", False):
            return self._tokens_by_prefix(text, spans)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [int(any(a < end and b > start for start, end in spans)) for a, b in encoded["offset_mapping"]]
        return encoded["input_ids"], mask

    def _tokens_by_prefix(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """The same with a tokenizer that tells no offsets: tokens that a prefix of the text has in common with it."""
        from trl.data_utils import common_prefix_length

        ids = self._ids(text)
        mask = [0] * len(ids)
        for start, end in spans:
            before, until = self._ids(text[:start]), self._ids(text[:end])
            shared = common_prefix_length(until, ids)
            last = shared + (shared < len(until))
            first = common_prefix_length(before, ids)
            mask[first:last] = [1] * len(mask[first:last])
        return ids, mask

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def plain(self, messages: Sequence[dict]) -> list[dict]:
        """Messages without absent keys, which Arrow fills with None, and with text parts joined for a text template."""
        plain = [_without_none(message) for message in messages]
        for message in plain:
            if isinstance(message.get("content"), list) and not self.takes_parts:
                message["content"] = "".join(part["text"] for part in message["content"])
        return plain

    def _takes_parts(self) -> bool:
        """Whether the template renders a list of text parts as it renders their text."""
        contents: list[Any] = [[{"type": "text", "text": _PROBE}], _PROBE]
        parts, text = (self._probed([{"role": "user", "content": content}]) for content in contents)
        return parts is not None and (parts == text or _PROBE not in (text or ""))

    def _probed(self, messages: Sequence[dict]) -> str | None:
        try:
            return self.render(messages)
        except DistillError:
            return None


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(inner) for key, inner in value.items() if inner is not None}
    return [_without_none(inner) for inner in value] if isinstance(value, list) else value
