"""Tokenizes pieces of text, without special tokens and without a space before the text."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from .token_bytes import TextRules, without_prefix_space


class TextEncoder:
    """Tokenizes pieces of text with a tokenizer of the library `tokenizers`.

    A piece is plain text: a special token that is spelled out in it is tokenized as text, and nothing is added.

    Args:
        rules: the tokenizer, see `text_rules`.
    """

    def __init__(self, rules: TextRules):
        self._backend = Tokenizer.from_str(json.dumps(without_prefix_space(rules.spec)))
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
