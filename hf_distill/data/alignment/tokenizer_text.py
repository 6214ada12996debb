"""What the alignment reads of a tokenizer."""

from dataclasses import dataclass
from typing import Any

from .special_tokens import SpecialTokens, common_thinking_marks, special_tokens
from .token_bytes import TextRules, TokenBytes, text_rules, token_bytes


@dataclass(frozen=True)
class TokenizerText:
    """The text of a tokenizer's tokens.

    table:    bytes of each id
    special:  its special tokens
    rules:    how it treats text
    """

    table: TokenBytes
    special: SpecialTokens
    rules: TextRules


def tokenizer_pair(student: Any, teacher: Any) -> tuple[TokenizerText, TokenizerText]:
    """Return the text of the tokens of two tokenizers.

    Args:
        student: a fast tokenizer of transformers, or a processor with one.
        teacher: likewise.

    Raises:
        DistillError: the text of the tokens of one of them cannot be mapped to bytes.
    """
    tokenizers = [getattr(each, "tokenizer", each) for each in (student, teacher)]
    rules = [text_rules(each, role) for each, role in zip(tokenizers, ("student", "teacher"), strict=True)]
    marks = common_thinking_marks(*tokenizers)
    specials = [special_tokens(each, marks) for each in tokenizers]
    student_text, teacher_text = (
        TokenizerText(token_bytes(tokenizer, rule, special), special, rule)
        for tokenizer, rule, special in zip(tokenizers, rules, specials, strict=True)
    )
    return student_text, teacher_text
