"""Tokenizes pieces of text, without special tokens and without a space before the text."""

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from .token_bytes import NEVER, TextRules


class TextEncoder:
    """Tokenizes pieces of text with a tokenizer of the library `tokenizers`.

    A piece is plain text: a special token that is spelled out in it is tokenized as text, and nothing is added.

    Args:
        tokenizer: a fast tokenizer of transformers.
        rules: see `text_rules`.
    """

    def __init__(self, tokenizer: Any, rules: TextRules):
        self._backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.post_processor = None
        parts = Tokenizer.from_str(json.dumps(_without_prefix_space(rules)))
        self._backend.normalizer, self._backend.pre_tokenizer = parts.normalizer, parts.pre_tokenizer
        self._backend.encode_special_tokens = True

    def __getstate__(self) -> dict[str, Any]:
        return {"backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._backend = state["backend"]
        self._backend.encode_special_tokens = True  # not in the state of the tokenizer

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each text, int64."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, dtype=np.int64) for each in encoded]

    def character_spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Return where each token of a text starts and ends, in characters of the text before its normalization.

        Tokens that share a character have the start and end of all of them. Characters that no token has, because they
        were composed with the one before, belong to the token before them.

        Returns:
            [N] and [N].
        """
        offsets = np.array(self._backend.encode(text, add_special_tokens=False).offsets, dtype=np.int64).reshape(-1, 2)
        if not len(offsets):
            return offsets[:, 0], offsets[:, 1]
        ends = np.maximum.accumulate(offsets[:, 1])
        starts = np.minimum.accumulate(offsets[::-1, 0])[::-1]
        is_group_start = np.append(True, starts[1:] >= ends[:-1])
        group = np.cumsum(is_group_start) - 1
        group_starts = starts[is_group_start]
        group_starts[0] = 0
        group_ends = np.append(group_starts[1:], len(text))
        return group_starts[group], group_ends[group]


def _without_prefix_space(rules: TextRules) -> dict:
    """Return a tokenizer without a vocabulary, whose normalizer and pre-tokenizer put no space before a text."""
    content: dict[str, Any] = json.loads(Tokenizer(models.BPE()).to_str())
    normalizer = [step for step in rules.normalizer if step["type"] != "Prepend"]
    without: dict[str, dict] = {"Metaspace": {"prepend_scheme": NEVER}, "ByteLevel": {"add_prefix_space": False}}
    pre_tokenizer = [step | without.get(step["type"], {}) for step in rules.pre_tokenizer]
    if normalizer:
        content["normalizer"] = {"type": "Sequence", "normalizers": normalizer}
    if pre_tokenizer:
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": pre_tokenizer}
    return content
