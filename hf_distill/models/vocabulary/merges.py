"""The merges of a BPE tokenizer: which tokens a text passes through on its way to a token."""

from collections.abc import Collection, Sequence
from itertools import pairwise


class Merges:
    """Merges of a BPE tokenizer, in the order of their priority.

    Args:
        pairs: the pairs that are merged, as in tokenizer.json: [left, right], or "left right".
        prefix: `continuing_subword_prefix` of the tokenizer.
        suffix: `end_of_word_suffix` of the tokenizer.
    """

    def __init__(self, pairs: Sequence[Sequence[str] | str], prefix: str = "", suffix: str = ""):
        self._pairs, self._prefix, self._suffix = pairs, prefix, suffix
        split = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in pairs]
        self._split: list[tuple[str, str]] = [(left, right) for left, right in split]
        self._ranks = {pair: rank for rank, pair in enumerate(self._split)}

    def derivation(self, token: str, vocabulary: Collection[str]) -> set[str]:
        """Return every token that occurs while the text of a token is merged, without the token itself.

        Encoding merges the pair of the lowest rank first, the leftmost of several. Within the text of a token that is
        in the result, the merges are the same in any context: no merge crosses its ends, and the order of those inside
        does not depend on others.

        Args:
            token: the token.
            vocabulary: all tokens.

        Returns:
            empty if the text is not merged into the token; then no merges make it.
        """
        parts = split_characters(token, self._prefix, self._suffix)
        if any(part not in vocabulary for part in parts):
            return set()
        seen = set(parts)
        while len(parts) > 1:
            ranks = [self._ranks.get(pair, len(self._split)) for pair in pairwise(parts)]
            at = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[at] == len(self._split):
                return set()
            parts[at : at + 2] = [self._merged(parts[at], parts[at + 1])]
            seen.add(parts[at])
        return seen - {token} if parts == [token] else set()

    def among(self, tokens: Collection[str]) -> list[Sequence[str] | str]:
        """Return the merges whose two parts and result are some tokens, in their order."""
        return [
            pair
            for pair, (left, right) in zip(self._pairs, self._split, strict=True)
            if left in tokens and right in tokens and self._merged(left, right) in tokens
        ]

    def _merged(self, left: str, right: str) -> str:
        return left + right.removeprefix(self._prefix)


def split_characters(token: str, prefix: str = "", suffix: str = "") -> list[str]:
    """Return the parts of one character that a token consists of.

    Args:
        token: the token.
        prefix: prefix of every part of a word but the first.
        suffix: suffix of the last part of a word.
    """
    is_continued, is_last = bool(prefix) and token.startswith(prefix), bool(suffix) and token.endswith(suffix)
    text = token.removeprefix(prefix) if is_continued else token
    text = text.removesuffix(suffix) if is_last else text
    parts = [f"{prefix}{character}" for character in text]
    if parts and not is_continued:
        parts[0] = text[0]
    if parts and is_last:
        parts[-1] += suffix
    return parts
