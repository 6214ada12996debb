"""The bytes of the text that each token id of a tokenizer stands for."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import DistillError
from .special_tokens import SPECIAL_BYTE, SpecialTokens

NEVER, FIRST, ALWAYS = "never", "first", "always"  # where a tokenizer puts a space before a text
_SPACE = "▁"  # how SentencePiece writes a space
_LOSSY_PRE_TOKENIZERS = ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "CharDelimiterSplit")


@dataclass(frozen=True)
class TextRules:
    """How a tokenizer treats text.

    normalizer:        steps of the normalizer of the library `tokenizers`, as in tokenizer.json
    pre_tokenizer:     steps of the pre-tokenizer
    is_byte_level:     whether each character of a token stands for a byte; else tokens are text with `▁` for a space
    prefix_space:      where a space is put before a text: never, before the first text of a document, or always, that
                       is also after each special token
    prefix_is_forced:  whether the space is put before a text that begins with a space, too
    """

    normalizer: list[dict]
    pre_tokenizer: list[dict]
    is_byte_level: bool
    prefix_space: str
    prefix_is_forced: bool


def text_rules(tokenizer: Any, role: str = "model") -> TextRules:
    """Read how a tokenizer treats text.

    Args:
        tokenizer: a tokenizer of transformers.
        role: student or teacher, for the error.

    Raises:
        DistillError: the text of its tokens cannot be mapped to bytes.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not getattr(tokenizer, "is_fast", False):
        raise _refusal(tokenizer, role, "it is not a fast tokenizer (one of the library `tokenizers`)")
    normalizer, pre_tokenizer = _steps(backend.normalizer), _steps(backend.pre_tokenizer)
    if reason := _refusal_reason(backend.model, normalizer, pre_tokenizer):
        raise _refusal(tokenizer, role, reason)
    steps = [*normalizer, *pre_tokenizer]
    prefix_space, is_forced = NEVER, False
    for step in steps:
        if step["type"] == "Prepend":
            prefix_space, is_forced = ALWAYS, True
        elif step["type"] == "Metaspace":
            prefix_space = step["prepend_scheme"]
        elif step["type"] == "ByteLevel" and step.get("add_prefix_space"):
            prefix_space = ALWAYS
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    return TextRules(normalizer, pre_tokenizer, is_byte_level, prefix_space, is_forced)


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of the V ids of a tokenizer; row V stands for every id that the tokenizer does not have.

    data:          [n] the bytes of all ids, uint8
    starts:        [V + 1] where the bytes of an id begin
    lengths:       [V + 1] their number
    is_special:    [V + 1] whether an id is a special token, whose bytes are a marker; see `SpecialTokens.marker`
    is_unmatched:  [V + 1] whether an id never matches a token of another tokenizer
    """

    data: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    is_special: np.ndarray
    is_unmatched: np.ndarray

    @property
    def size(self) -> int:
        """V."""
        return len(self.starts) - 1

    def rows(self, ids: np.ndarray) -> np.ndarray:
        """Return the rows of ids [n]: the ids, and V where the tokenizer does not have an id."""
        return np.where((ids >= 0) & (ids < self.size), ids, self.size)

    def of_id(self, token_id: int) -> bytes:
        """Return the bytes of an id."""
        start = self.starts[token_id]
        return self.data[start : start + self.lengths[token_id]].tobytes()

    def concatenate(self, rows: np.ndarray, skip: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return the bytes of tokens, and where each token ends in them.

        Args:
            rows: [N] see `rows`.
            skip: [N] number of bytes to leave out at the start of each token.

        Returns:
            [n] uint8 and [N] int64.
        """
        starts, lengths = self.starts[rows], self.lengths[rows]
        if skip is not None:
            starts, lengths = starts + skip, lengths - skip
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        source = np.arange(total) + np.repeat(starts - ends + lengths, lengths)
        return self.data[source], ends

    def begins_with_space(self, rows: np.ndarray) -> np.ndarray:
        """Return whether tokens [N] begin with a space."""
        first = self.data[np.minimum(self.starts[rows], len(self.data) - 1)]
        return (first == ord(" ")) & (self.lengths[rows] > 0) & ~self.is_special[rows]


def token_bytes(tokenizer: Any, rules: TextRules, special: SpecialTokens) -> TokenBytes:
    """Return the bytes of each id of a tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        rules: see `text_rules`.
        special: its special tokens, see `special_tokens`.
    """
    vocabulary = tokenizer.get_vocab()
    size = 1 + max(vocabulary.values(), default=-1)
    texts: list[bytes | None] = [None] * (size + 1)
    to_bytes = _byte_level_bytes if rules.is_byte_level else _sentencepiece_bytes
    for token, i in vocabulary.items():
        texts[i] = to_bytes(token)
    for i, token in tokenizer.added_tokens_decoder.items():
        content = token.content if rules.is_byte_level else token.content.replace(_SPACE, " ")
        texts[i] = content.encode()
    unmatched = {i for i, text in enumerate(texts) if text is None} | special.unmatched
    unknown = vocabulary.get(getattr(tokenizer.backend_tokenizer.model, "unk_token", None))
    if unknown is not None and unknown not in special.meanings:
        unmatched.add(unknown)
    for i in special.contents:
        texts[i] = special.marker(i)
    filled = [SPECIAL_BYTE if i in unmatched or text is None else text for i, text in enumerate(texts)]
    lengths = np.array([len(text) for text in filled], dtype=np.int64)
    is_special, is_unmatched = np.zeros((2, size + 1), dtype=bool)
    is_unmatched[sorted(unmatched)] = True
    is_special[sorted(unmatched | special.contents.keys())] = True
    data = np.frombuffer(b"".join(filled), dtype=np.uint8)
    return TokenBytes(data, np.cumsum(lengths) - lengths, lengths, is_special, is_unmatched)


def _byte_of_characters() -> dict[str, int]:
    """Return the byte that each character of a token of byte-level BPE stands for.

    Printable characters of Latin-1 stand for themselves, and the other bytes are the characters from 256 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_characters()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # text that is no token of the model
        return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            pass
    return token.replace(_SPACE, " ").encode()


def _steps(component: Any) -> list[dict]:
    """Return the steps of a normalizer or pre-tokenizer of the library `tokenizers`, as in tokenizer.json."""
    return [] if component is None else list(_flatten(json.loads(component.__getstate__())))


def _flatten(step: dict) -> Iterator[dict]:
    if step["type"] != "Sequence":
        yield step
        return
    for inner in step.get("normalizers", step.get("pretokenizers", ())):
        yield from _flatten(inner)


def _refusal_reason(model: Any, normalizer: list[dict], pre_tokenizer: list[dict]) -> str | None:
    kind = type(model).__name__
    if kind not in ("BPE", "Unigram"):
        return f"its model is {kind}, whose tokens do not keep the white space"
    if getattr(model, "continuing_subword_prefix", None) or getattr(model, "end_of_word_suffix", None):
        return "its tokens mark the parts of words by a prefix or suffix and do not keep the white space"
    writes_spaces = is_byte_level = False
    for step in normalizer:
        is_space = step["type"] == "Replace" and step["content"] == _SPACE and step["pattern"] == {"String": " "}
        if step["type"] not in ("NFC", "Prepend", "ByteLevel") and not is_space:
            return f"its normalizer {step['type']} changes the text"
        if step["type"] == "Prepend" and step["prepend"] != _SPACE:
            return f"its normalizer puts {step['prepend']!r} before the text"
        writes_spaces |= is_space
        is_byte_level |= step["type"] == "ByteLevel"
    for step in pre_tokenizer:
        is_removed = step.get("behavior") == "Removed" and not step.get("invert")
        if step["type"] in _LOSSY_PRE_TOKENIZERS or is_removed:
            return f"its pre-tokenizer {step['type']} removes characters"
        writes_spaces |= step["type"] == "Metaspace" and step["replacement"] == _SPACE
        is_byte_level |= step["type"] == "ByteLevel"
    if not (writes_spaces or is_byte_level):
        return f"its tokens are neither bytes nor text with {_SPACE} for spaces"
    return None


def _refusal(tokenizer: Any, role: str, reason: str) -> DistillError:
    return DistillError(
        f"The text of the {role}'s tokens ({type(tokenizer).__name__}) cannot be mapped to bytes, because {reason}. "
        "Teachers of another tokenizer need byte-level BPE (GPT-2, Qwen, Llama 3) or SentencePiece BPE (Gemma, Llama "
        "2) on both sides: use such a model, or a teacher with the student's tokenizer."
    )
