"""Tokenization of conversations: a chat template renders them, and the assistant's turns become target tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..errors import DistillError, require_package
from .checks import without_none

logger = logging.get_logger(__name__)

ASSISTANT = "assistant"
Tools: TypeAlias = list[dict] | None  # JSON schemas of functions
Span = tuple[int, int]  # characters of a rendered conversation, the end excluded
_PROBE = "What is 2 + 2?"
# What transformers and the tokenizer give a template.
_OWN_VARIABLES = frozenset(
    ("messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now")
    + ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
)


class Conversations:
    """Tokenizes conversations with one chat template.

    Assistant turns are those that the template marks with `{% generation %}`. In a template without marks, an assistant
    turn is the text that is added when the conversation is rendered up to and including the turn, compared with the
    conversation up to the turn with a generation prompt. It follows the generation prompt and includes end-of-turn
    tokens.

    Args:
        tokenizer: the student's tokenizer.
        chat_template: Jinja source; None: the tokenizer's chat template.

    Raises:
        DistillError: there is no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None):
        require_package("trl", "trl", "Reading conversations")
        from trl.chat_template_utils import has_generation_markers

        self.tokenizer = tokenizer
        template = chat_template or getattr(tokenizer, "chat_template", None)
        if isinstance(template, dict):  # several templates by name
            template = template.get("default")
        if template is None:
            raise DistillError(
                "The source has conversations, but the tokenizer has no chat_template. Set `data.chat_template` in the "
                "recipe, or `tokenizer.chat_template` in a script."
            )
        self.chat_template: str = template
        self.has_marks = has_generation_markers(self.chat_template)
        self.renders_parts = self._renders_parts()

    def encode(
        self,
        messages: Sequence[dict],
        tools: Tools = None,
        first: int = 0,
        assistant_only: bool = True,
    ) -> tuple[list[int], list[int]]:
        """Return the token ids [S] of a conversation and its target mask [S]: 1 for a target token, 0 for others.

        Args:
            messages: list of `{"role": ..., "content": ...}`.
            tools: JSON schemas of functions, for the template.
            first: index of the first message whose tokens may be targets; earlier messages are the prompt.
            assistant_only: only the assistant's turns are targets; otherwise every token from message `first` on.

        Raises:
            DistillError: the template refuses the conversation, leaves out its tools or tool calls, or renders a prefix
                of it differently than inside the full conversation.
        """
        messages = self.normalize(messages)
        self._check_tools(messages, tools)
        if assistant_only and self.has_marks and not first:
            return self._encode_marked(messages, tools)
        text = self.render(messages, tools)
        spans = [(0, len(text))]
        if first:
            spans = [(self._prefix_length(text, messages[:first], tools, True), len(text))]
        if assistant_only and not self.has_marks:
            turns = [i for i in range(first, len(messages)) if messages[i]["role"] == ASSISTANT]
            spans = [self._turn_span(text, messages, i, tools) for i in turns]
        ids, mask = self._tokens(text, spans)
        if assistant_only and self.has_marks:
            mask = [bit and marked for bit, marked in zip(mask, self._encode_marked(messages, tools)[1], strict=True)]
        return ids, mask

    def render(
        self,
        messages: Sequence[dict],
        tools: Tools = None,
        add_generation_prompt: bool = False,
        variables: Mapping[str, object] | None = None,
    ) -> str:
        """Return the text that the chat template renders of a conversation.

        Args:
            messages: list of `{"role": ..., "content": ...}`.
            tools: JSON schemas of functions, for the template.
            add_generation_prompt: whether the text ends with the header of an assistant's turn.
            variables: further variables of the template, such as enable_thinking.

        Raises:
            DistillError: the template refuses the conversation.
        """
        options = {**(variables or {}), "tokenize": False, "add_generation_prompt": add_generation_prompt}
        return self._apply(messages, tools, **options)

    def check_variables(self, names: Iterable[str]) -> None:
        """Check that the template reads variables; others would have no effect.

        Raises:
            DistillError: it does not read one of them.
        """
        from transformers.utils.chat_template_utils import _get_template_variables

        known = _get_template_variables(self.chat_template) - _OWN_VARIABLES
        for name in names:
            if name not in known:
                others = f"; it reads {', '.join(sorted(known))}" if known else ""
                raise DistillError(f"the chat template does not read the variable {name!r}{others}")

    def _apply(self, messages: Sequence[dict], tools: Tools, **options: object) -> Any:
        apply: Callable = self.tokenizer.apply_chat_template
        try:
            return apply(messages, tools=tools or None, chat_template=self.chat_template, **options)
        except Exception as error:  # a template is a program and may raise any exception
            raise DistillError(
                f"the chat template cannot render the conversation: {type(error).__name__}: {error}"
            ) from error

    def _check_tools(self, messages: Sequence[dict], tools: Tools) -> None:
        """Check that the template renders tools and tool calls; many templates ignore them."""
        without_calls = [{k: v for k, v in message.items() if k != "tool_calls"} for message in messages]
        calls = {"`tool_calls`": (without_calls, tools)} if without_calls != list(messages) else {}
        for part, (others, other_tools) in (calls | ({"`tools`": (messages, None)} if tools else {})).items():
            if self._render_or_none(others, other_tools) == self.render(messages, tools):
                raise DistillError(
                    f"the conversation has {part}, and the chat template leaves them out. Set `chat_template` to a "
                    f"template that renders them, or remove {part} from the data"
                )

    def _encode_marked(self, messages: Sequence[dict], tools: Tools) -> tuple[list[int], list[int]]:
        encoded = self._apply(messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        return encoded["input_ids"], encoded["assistant_masks"]

    def _turn_span(self, text: str, messages: Sequence[dict], index: int, tools: Tools) -> Span:
        """Return where message `index` is in the text of the full conversation, without the generation prompt."""
        if not index:
            raise DistillError(
                f"the conversation begins with an assistant's turn, which has no prompt. {self._remedy()}"
            )
        start = self._prefix_length(text, messages[:index], tools, True)
        end = len(text)
        if index + 1 < len(messages):
            end = self._prefix_length(text, messages[: index + 1], tools, False)
        return start, end

    def _prefix_length(self, text: str, messages: Sequence[dict], tools: Tools, add_generation_prompt: bool) -> int:
        prefix = self.render(messages, tools, add_generation_prompt)
        if not text.startswith(prefix):
            raise DistillError(
                f"the chat template renders the first {len(messages)} messages differently alone than inside the full "
                f"conversation, so the tokens of the assistant's turns cannot be located. {self._remedy()}"
            )
        return len(prefix)

    def _remedy(self) -> str:
        from .training_templates import matching_template

        name = matching_template(self.tokenizer, self.chat_template)
        hint = f" ({name!r} renders the same text)" if name else ""
        return (
            "Either set `chat_template` to a template that marks the assistant's turns with {% generation %}"
            f"{hint}, or train on all tokens of the conversation with `assistant_only: false`"
        )

    def _tokens(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Return the token ids [S] of a text and a mask [S]: 1 for each token that overlaps one of the spans."""
        if not getattr(self.tokenizer, "is_fast", False):
            return self._tokens_by_prefix(text, spans)
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        mask = [int(any(first < end and last > start for start, end in spans)) for first, last in offsets]
        return encoded["input_ids"], mask

    def _tokens_by_prefix(self, text: str, spans: Sequence[Span]) -> tuple[list[int], list[int]]:
        """Do the same for a tokenizer without offsets: compare the tokens of prefixes of the text with all tokens."""
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

    def normalize(self, messages: Sequence[dict]) -> list[dict]:
        """Return messages without the None values of Arrow, and with text parts joined if the template needs text."""
        plain = [without_none(message) for message in messages]
        for message in plain:
            if isinstance(message.get("content"), list) and not self.renders_parts:
                message["content"] = "".join(part["text"] for part in message["content"])
        return plain

    def _renders_parts(self) -> bool:
        """Whether the template renders a list of text parts as it renders their text."""
        contents: list[object] = [[{"type": "text", "text": _PROBE}], _PROBE]
        parts, text = (self._render_or_none([{"role": "user", "content": content}]) for content in contents)
        return parts is not None and (parts == text or _PROBE not in (text or ""))

    def _render_or_none(self, messages: Sequence[dict], tools: Tools = None) -> str | None:
        try:
            return self.render(messages, tools)
        except DistillError:
            return None
