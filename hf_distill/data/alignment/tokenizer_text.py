"""What the alignment reads of a tokenizer."""

from dataclasses import dataclass
from typing import Any

from .special_tokens import SpecialTokens, common_thinking_marks, special_tokens
from .token_bytes import NEVER, TextRules, TokenBytes, text_rules, token_bytes


@dataclass(frozen=True)
class TokenizerText:
    """The text of a tokenizer's tokens.

    table:             bytes of each id
    special:           its special tokens
    prefix_space:      see `TextRules`
    prefix_is_forced:  see `TextRules`
    """

    table: TokenBytes
    special: SpecialTokens
    prefix_space: str = NEVER
    prefix_is_forced: bool = False


def tokenizer_pair(student: Any, teacher: Any) -> tuple[TokenizerText, TokenizerText, TextRules]:
    """Return the text of the tokens of two tokenizers, and how the teacher's treats text.

    Args:
        student: a fast tokenizer of transformers, or a processor with one.
        teacher: likewise.

    Raises:
        DistillError: the text of the tokens of one of them cannot be mapped to bytes.
    """
    tokenizers = [getattr(each, "tokenizer", each) for each in (student, teacher)]
    rules = [text_rules(each, who) for each, who in zip(tokenizers, ("student", "teacher"), strict=True)]
    marks = common_thinking_marks(*tokenizers)
    texts = []
    for tokenizer, rule in zip(tokenizers, rules, strict=True):
        special = special_tokens(tokenizer, marks)
        table = token_bytes(tokenizer, rule, special)
        texts.append(TokenizerText(table, special, rule.prefix_space, rule.prefix_is_forced))
    return texts[0], texts[1], rules[1]
