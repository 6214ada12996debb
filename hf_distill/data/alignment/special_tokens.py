"""Special tokens of different tokenizers that mean the same."""

from dataclasses import dataclass
from typing import Any

END_OF_TEXT, END_OF_TURN = "end of text", "end of turn"
START_OF_TEXT = "start of text"
START_OF_TURN = "start of turn"  # the role follows as text
START_OF_ROLE, END_OF_ROLE = "start of role", "end of role"  # around the role's name
USER, ASSISTANT = "user", "assistant"  # the turn's role and its start
THINKING, END_OF_THINKING = "thinking", "end of thinking"

NAMES = {
    END_OF_TEXT: ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOS_TOKEN>", "<｜end▁of▁sentence｜>", "[EOS]"),
    END_OF_TURN: (
        *(
            "<|im_end|>",
            "<end_of_turn>",
            "<|eot_id|>",
            "<|eot|>",
            "<|end|>",
            "<|end_of_turn|>",
            "<|END_OF_TURN_TOKEN|>",
        ),
        *("<|return|>", "<turn|>", "[EOT]"),
    ),
    START_OF_TEXT: ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "<BOS_TOKEN>", "<｜begin▁of▁sentence｜>"),
    START_OF_TURN: ("<|im_start|>", "<start_of_turn>", "<|turn>"),
    START_OF_ROLE: ("<|start_header_id|>", "<|header_start|>", "<|start_of_role|>"),
    END_OF_ROLE: ("<|end_header_id|>", "<|header_end|>", "<|end_of_role|>"),
    USER: ("<|user|>", "<｜User｜>", "<|USER_TOKEN|>", "[INST]"),
    ASSISTANT: ("<|assistant|>", "<｜Assistant｜>", "<|CHATBOT_TOKEN|>", "[/INST]"),
    THINKING: ("<think>", "[THINK]", "◁think▷", "<|begin_of_thought|>", "<|START_THINKING|>"),
    END_OF_THINKING: ("</think>", "[/THINK]", "◁/think▷", "<|end_of_thought|>", "<|END_THINKING|>"),
}
ENDS = frozenset({END_OF_TEXT, END_OF_TURN})
TURN_MARKS = frozenset({START_OF_TURN, START_OF_ROLE, USER, ASSISTANT})
THINKING_MARKS = frozenset({THINKING, END_OF_THINKING})
_MEANING = {name: meaning for meaning, names in NAMES.items() for name in names}
_ORDER = {name: i for i, name in enumerate(_MEANING)}

SPECIAL_BYTE = b"\xff"  # first byte of a marker; UTF-8 never contains it


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    contents:   id -> the token as a string
    meanings:   id -> one of the meanings above, for the tokens that have one
    unmatched:  ids that never match a token of another tokenizer: padding, and unknown text
    eos_id:     id of the token that ends a text; None if there is none
    bos_ids:    ids that the tokenizer puts before each text
    """

    contents: dict[int, str]
    meanings: dict[int, str]
    unmatched: frozenset[int]
    eos_id: int | None
    bos_ids: tuple[int, ...]

    def marker(self, token_id: int) -> bytes:
        """Return bytes that are equal for special tokens of two tokenizers if they can stand at the same place.

        An end of a turn and an end of text can: many tokenizers have one token for both.
        """
        if token_id in self.unmatched:
            return SPECIAL_BYTE
        meaning = self.meanings.get(token_id, self.contents[token_id])
        return SPECIAL_BYTE + ("end" if meaning in ENDS else meaning).encode()

    def id_of(self, meaning: str) -> int | None:
        """Return the id of the token with a meaning; of several the one that stands first in `NAMES`, EOS before all.

        A tokenizer without an end of turn ends turns with its EOS token.
        """
        ids = [i for i, other in self.meanings.items() if other == meaning]
        if self.eos_id in ids or (meaning in ENDS and not ids):
            return self.eos_id
        return min(ids, key=lambda i: _ORDER.get(self.contents[i], len(_ORDER)), default=None)

    def id_of_content(self, content: str) -> int | None:
        """Return the id of the special token with a string."""
        return next((i for i, other in self.contents.items() if other == content and i not in self.unmatched), None)


def special_tokens(tokenizer: Any, thinking_marks: frozenset[str] = THINKING_MARKS) -> SpecialTokens:
    """Return the special tokens of a tokenizer of transformers.

    Args:
        tokenizer: a fast tokenizer.
        thinking_marks: meanings of thinking marks that count as special tokens; the others are text. A pair of
            tokenizers uses those that both have, see `common_thinking_marks`.
    """
    contents = {}
    for i, token in tokenizer.added_tokens_decoder.items():
        is_special = token.special or i in tokenizer.all_special_ids
        meaning = _MEANING.get(token.content)
        if meaning in thinking_marks or (is_special and meaning not in THINKING_MARKS):
            contents[i] = token.content
    for i, content in zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True):
        contents.setdefault(i, content)
    meanings = {i: _MEANING[content] for i, content in contents.items() if content in _MEANING}
    eos, bos, pad, unk = (getattr(tokenizer, f"{name}_token_id") for name in ("eos", "bos", "pad", "unk"))
    for i, meaning in ((eos, END_OF_TEXT), (bos, START_OF_TEXT)):
        if i is not None:
            meanings.setdefault(i, meaning)
    unmatched = frozenset(i for i in (pad, unk) if i is not None and i not in meanings)
    return SpecialTokens(contents, meanings, unmatched, eos, _bos_ids(tokenizer))


def common_thinking_marks(student: Any, teacher: Any) -> frozenset[str]:
    """Return the meanings of the thinking marks that both tokenizers have a token for."""
    of_both = [
        {_MEANING.get(token.content) for token in tokenizer.added_tokens_decoder.values()}
        for tokenizer in (student, teacher)
    ]
    return frozenset(meaning for meaning in THINKING_MARKS if all(meaning in each for each in of_both))


def _bos_ids(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before a text."""
    plain, full = (tokenizer("a", add_special_tokens=add)["input_ids"] for add in (False, True))
    starts = [i for i in range(len(full) - len(plain) + 1) if full[i : i + len(plain)] == plain]
    return tuple(full[: starts[0]]) if starts else ()
