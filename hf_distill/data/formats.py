"""Formats of examples, detected from the columns, and the tokenization of one example to a row."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.targets import IGNORE_INDEX
from ..errors import DistillError, require_package
from .checks import UNNAMED_SOURCE, check_messages, check_text, check_tokens, check_tools, naming
from .conversations import Conversations
from .roles import SHAREGPT_HINT, check_roles
from .training_templates import matching_template, training_template

logger = logging.get_logger(__name__)

TEXT, MESSAGES, COMPLETION, TOKENS = "text", "messages", "completion", "tokens"


@dataclass(frozen=True)
class SecondPrompt:
    """Another prompt before the same completion, which is tokenized to a second row.

    column:   column of the prompt
    prefix:   of the names of the second row's columns, as in `teacher_input_ids`
    """

    column: str
    prefix: str

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the ids and labels of the second row."""
        return f"{self.prefix}input_ids", f"{self.prefix}labels"


PARAPHRASE = SecondPrompt("paraphrase", "view_")
TEACHER_PROMPT = SecondPrompt("teacher_prompt", "teacher_")


@dataclass(frozen=True)
class OtherTokenizer:
    """A teacher with another tokenizer, which reads conversations in its own tokens and with its own chat template.

    tokenizer: the teacher's tokenizer
    name:      name of the teacher if there are several
    """

    tokenizer: PreTrainedTokenizerBase
    name: str | None = None

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the ids and labels of the teacher's row."""
        suffix = "" if self.name is None else f"_{self.name}"
        return f"teacher_input_ids{suffix}", f"teacher_labels{suffix}"


_FORMAT_COLUMNS = {TOKENS: {"input_ids"}, MESSAGES: {"messages"}, COMPLETION: {"prompt", "completion"}, TEXT: {"text"}}
_FORMATS = (
    "text; messages; prompt and completion; input_ids (with labels, completion_mask or assistant_masks, or with none)"
)


def format_of(
    columns: Sequence[str],
    column: str | None = None,
    where: str = UNNAMED_SOURCE,
    second_prompt: SecondPrompt | None = None,
) -> str:
    """Return the format of a data set: the first of `input_ids`, `messages`, `prompt` + `completion` and `text`.

    Args:
        columns: column names of the data set.
        column: the column that holds the text; None: the format is detected from the columns.
        where: name of the source in errors.
        second_prompt: another prompt for the same completion, which the data set must have.

    Returns:
        "tokens", "messages", "completion" or "text".

    Raises:
        DistillError: there is no such column, the columns are none of the formats, or there is no second prompt.
    """
    if column is not None:
        if column not in columns:
            raise DistillError(
                f"{where} has no column {column!r}; it has {list(columns)}. Set `column` to one of them, or "
                "remove it, and the names of the columns decide which format the rows have."
            )
        return TEXT
    for kind, needed in _FORMAT_COLUMNS.items():
        if needed <= set(columns):
            if second_prompt is not None:
                needed = {"prompt", "completion", second_prompt.column}
                if kind != COMPLETION or not needed <= set(columns):
                    raise DistillError(
                        f"{where} has the format {kind} and the columns {list(columns)}; a {second_prompt.column} "
                        f"needs the columns {', '.join(sorted(needed))}. Add them, or do without it: remove the view "
                        "paraphrase, or the prompt of the teacher (its template, or the column teacher_prompt)."
                    )
            return kind
    hint = f" {SHAREGPT_HINT}" if "conversations" in columns else ""
    raise DistillError(
        f"{where} has the columns {list(columns)}, which are none of the four formats: {_FORMATS}. Rename the columns, "
        f"or set `column` to the one that holds the text.{hint}"
    )


def make_encode_fn(
    kind: str,
    tokenizer: PreTrainedTokenizerBase,
    assistant_only: bool | None = None,
    second_prompt: SecondPrompt | None = None,
    chat_template: str | None = None,
    other_tokenizers: Sequence[OtherTokenizer] = (),
) -> Callable[[dict], dict[str, list[int]]]:
    """Return a function that tokenizes an example to `{"input_ids": [S], "labels": [S]}`.

    Labels are -100 where a token is no target.

    Args:
        kind: "messages", "completion" or "tokens"; see `format_of`.
        tokenizer: the student's tokenizer; it has a chat template if there are conversations.
        assistant_only: whether only the assistant's turns of a conversation are targets, or all tokens; None: True.
        second_prompt: add the ids and labels of the completion after another prompt, see `SecondPrompt`.
        chat_template: Jinja source that renders conversations; None: the tokenizer's chat template.
        other_tokenizers: add the ids and labels of the example in the tokens of teachers with other tokenizers,
            rendered with their own chat templates; with the second prompt if it is that of the teacher.

    Raises:
        DistillError: an example is invalid, see `checks` and `Conversations.encode`.
    """
    if other_tokenizers:
        student_prompt = None if second_prompt == TEACHER_PROMPT else second_prompt
        read_student = make_encode_fn(kind, tokenizer, assistant_only, student_prompt, chat_template)
        readers = [_teacher_reader(kind, each, second_prompt) for each in other_tokenizers]

        def read_all(example: dict) -> dict[str, list[int]]:
            row = read_student(example)
            for reader in readers:
                row |= reader(example)
            return row

        return read_all
    if kind == TOKENS:
        size = 1 + max(tokenizer.get_vocab().values())
        return lambda example: _from_tokens(example, tokenizer, size)
    require_package("trl", "trl", "Reading conversations and completions")
    read = _ConversationTokenizer(tokenizer, chat_template, assistant_only is not False)
    if kind == MESSAGES:
        read.conversations  # noqa: B018  a missing chat template is an error before the first row
        return read.from_messages
    return read.from_completion if second_prompt is None else partial(read.from_two_prompts, second=second_prompt)


def _teacher_reader(
    kind: str, other: OtherTokenizer, second_prompt: SecondPrompt | None
) -> Callable[[dict], dict[str, list[int]]]:
    """Return a function that makes the row of a teacher with another tokenizer from an example."""
    teacher_name = "the teacher" if other.name is None else f"the teacher {other.name}"
    template = getattr(other.tokenizer, "chat_template", None)
    if kind == MESSAGES and template is None:
        raise DistillError(
            f"The source has conversations, which {teacher_name} reads with its own chat template, and its tokenizer "
            "has none: give the teacher a tokenizer with a chat_template (in a recipe: `tokenizer` of the teacher), or "
            "write the conversations as texts."
        )
    marked = matching_template(other.tokenizer) if isinstance(template, str) else None  # renders the same text
    read = _ConversationTokenizer(other.tokenizer, marked and training_template(marked), assistant_only=True)
    column = second_prompt.column if second_prompt == TEACHER_PROMPT else "prompt"

    def read_row(example: dict) -> dict[str, list[int]]:
        with _of_teacher(teacher_name):
            row = read.from_messages(example) if kind == MESSAGES else read.from_completion(example, column)
        return dict(zip(other.columns, (row["input_ids"], row["labels"]), strict=True))

    return read_row


@contextmanager
def _of_teacher(teacher_name: str) -> Iterator[None]:
    """Add to errors that the chat template is the teacher's, and what is possible."""
    try:
        yield
    except DistillError as error:
        raise DistillError(
            f"for {teacher_name}, which reads conversations with its own chat template: {str(error).rstrip('.')}. "
            "Change the conversation (a system turn can become the beginning of the first user turn), leave it out, or "
            "give the teacher a tokenizer whose chat_template renders it."
        ) from error


def _from_tokens(example: dict, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> dict[str, list[int]]:
    ids, labels, masks = check_tokens(example, vocab_size)
    if labels is not None:
        return {"input_ids": ids, "labels": labels}
    if not masks and example.get("attention_mask") is None:
        ids = _without_padding(ids, tokenizer)
    return _row(ids, *masks)


def _without_padding(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return ids without padding tokens at the ends; if the padding token is also BOS or EOS, one is kept."""
    pad = tokenizer.pad_token_id
    start, end = 0, len(ids)
    while start < end and ids[start] == pad:
        start += 1
    while end > start and ids[end - 1] == pad:
        end -= 1
    if start and pad in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        start -= 1
    if end < len(ids) and pad == tokenizer.eos_token_id:
        end += 1
    return ids[start:end]


class _ConversationTokenizer:
    """Tokenizes conversations, and prompts with completions, which may be conversations too."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None, assistant_only: bool):
        self.tokenizer, self.assistant_only = tokenizer, assistant_only
        self._chat_template = chat_template

    @cached_property
    def conversations(self) -> Conversations:
        return Conversations(self.tokenizer, self._chat_template)

    def from_messages(self, example: dict) -> dict[str, list[int]]:
        messages, tools = self._messages(example, "messages"), check_tools(example)
        with naming("messages"):
            return _row(*self.conversations.encode(messages, tools, assistant_only=self.assistant_only))

    def _messages(self, example: dict, column: str) -> list[dict]:
        messages = check_messages(example, column)
        check_roles(messages, self.conversations.chat_template, column)
        return messages

    def from_completion(self, example: dict, column: str = "prompt") -> dict[str, list[int]]:
        if not isinstance(example.get(column), list):
            return self._from_texts(check_text(example, column), check_text(example, "completion"))
        prompt, completion = self._messages(example, column), self._messages(example, "completion")
        tools = check_tools(example)
        with naming("completion"):
            return _row(*self.conversations.encode(prompt + completion, tools, len(prompt), self.assistant_only))

    def _from_texts(self, prompt: str, completion: str) -> dict[str, list[int]]:
        from trl.data_utils import common_prefix_length

        end = self.tokenizer.eos_token or ""
        prompt_ids = self._ids(prompt)
        ids = self._ids(prompt + completion + ("" if completion.endswith(end) else end))
        start = common_prefix_length(prompt_ids, ids)
        if start < len(prompt_ids):
            logger.warning_once(
                "The last tokens of a prompt change when its completion follows: "
                f"{self.tokenizer.decode(prompt_ids[start:])!r} becomes part of the target tokens. End prompts at a "
                "token boundary. This warning is logged once."
            )
        return _row(ids, [0] * start + [1] * (len(ids) - start))

    def _ids(self, text: str) -> list[int]:
        """Return the token ids of a text, without the EOS token that some tokenizers append to every text."""
        ids = self.tokenizer(text)["input_ids"]
        return ids[:-1] if self._appends_eos else ids

    @cached_property
    def _appends_eos(self) -> bool:
        return self.tokenizer("a")["input_ids"][-1:] == [self.tokenizer.eos_token_id]

    def from_two_prompts(self, example: dict, second: SecondPrompt) -> dict[str, list[int]]:
        if type(example.get("prompt")) is not type(example.get(second.column)):
            raise DistillError(
                f"column {second.column}: it must have the type of the prompt, a text or a list of messages; found "
                f"{example.get(second.column)!r} for {example.get('prompt')!r}. Give every example a {second.column}, "
                "or leave the example out."
            )
        if not example[second.column]:
            raise DistillError(
                f"column {second.column}: it is empty, and the tokens of a completion are predicted after a prompt. "
                f"Give every example a {second.column}, or leave the example out."
            )
        other, row = self.from_completion(example, second.column), self.from_completion(example)
        return row | dict(zip(second.columns, (other["input_ids"], other["labels"]), strict=True))


def _row(ids: list[int], *masks: list[int]) -> dict[str, list[int]]:
    """Return a row whose targets are the tokens that are 1 in every mask."""
    targets = zip(*masks, strict=True) if masks else ((True,) for _ in ids)
    return {
        "input_ids": ids,
        "labels": [token if all(bits) else IGNORE_INDEX for token, bits in zip(ids, targets, strict=True)],
    }
