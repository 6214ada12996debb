"""The content of a tokenizer.json: which tokens it cannot do without, and the same content with fewer tokens."""

import copy
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

from ...errors import DistillError
from .merges import Merges, split_characters

_MODELS = ("BPE", "Unigram", "WordPiece")
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


class TokenizerContent:
    """The content of the tokenizer.json of a fast tokenizer, of the model BPE, Unigram or WordPiece.

    Args:
        tokenizer: a tokenizer of transformers.

    Attributes:
        content: the content of tokenizer.json.
        ids: token -> id, of the model and the added tokens.
        tokens: id -> token.

    Raises:
        DistillError: it is not a fast tokenizer, or of another model.
    """

    def __init__(self, tokenizer: Any):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not getattr(tokenizer, "is_fast", False):
            raise DistillError(
                f"A {type(tokenizer).__name__} is not a fast tokenizer (one of the library `tokenizers`), so its "
                "vocabulary cannot be trimmed: load it with AutoTokenizer, or convert it to a tokenizer.json."
            )
        self.content: dict[str, Any] = json.loads(backend.to_str())
        self._model: dict[str, Any] = self.content["model"]
        if self._model["type"] not in _MODELS:
            raise DistillError(
                f"The tokenizer is a {self._model['type']} model, whose vocabulary cannot be trimmed: text with a "
                f"removed token would be unknown. Possible are {', '.join(_MODELS)}."
            )
        pieces = self._model["vocab"]
        by_index = {piece: index for index, (piece, _) in enumerate(pieces)} if isinstance(pieces, list) else None
        self._model_ids: dict[str, int] = dict(pieces) if by_index is None else by_index
        self._added: list[dict[str, Any]] = self.content["added_tokens"]
        self.ids = self._model_ids | {token["content"]: token["id"] for token in self._added}
        self.tokens = {index: token for token, index in self.ids.items()}
        self._prefix = self._model.get("continuing_subword_prefix") or ""
        self._suffix = self._model.get("end_of_word_suffix") or ""

    @property
    def type(self) -> str:
        """BPE, Unigram or WordPiece."""
        return self._model["type"]

    @cached_property
    def mandatory(self) -> frozenset[int]:
        """The ids without which some text could not be encoded or would change when it is decoded.

        Added and special tokens, the unknown token, and with byte fallback the tokens of the bytes and of the
        character that stands for a space. Without byte fallback: the tokens of one character, which are the bytes of a
        byte-level tokenizer, and tokens with a character that has no token. Of a Unigram model also the piece with the
        lowest score, on which the score of unknown characters depends.
        """
        ids = {token["id"] for token in self._added} | {self._model_ids[piece] for piece in self._unknown_pieces()}
        if self._model.get("byte_fallback") and all(token in self._model_ids for token in _BYTES):
            ids |= {self._model_ids[token] for token in (*_BYTES, *self._space_characters())}
        else:
            lengths = {token: len(self._characters(token)) for token in self._model_ids}
            ids |= {index for token, index in self._model_ids.items() if lengths[token] == 1}
            if self.type != "BPE":  # no merge makes such a token of BPE
                ids |= {index for token, index in self._model_ids.items() if not self._has_characters(token)}
        if self.type == "Unigram":
            ids.add(min(range(len(self._model["vocab"])), key=lambda index: self._model["vocab"][index][1]))
        return frozenset(ids)

    def needed_by(self, index: int) -> frozenset[int]:
        """Return the ids without which a token cannot be made of text, or would be made of other text.

        BPE: every token that the merges of its text pass through. Unigram: its characters that have a token. WordPiece:
        none.

        Args:
            index: id of the token.
        """
        token = self.tokens[index]
        if token not in self._model_ids or self.type == "WordPiece":
            return frozenset()
        if self.type == "BPE":
            return frozenset(self._model_ids[part] for part in self._merges.derivation(token, self._model_ids))
        return frozenset(self._model_ids[part] for part in self._characters(token) if part in self._model_ids)

    def with_ids(self, kept_ids: Sequence[int]) -> dict[str, Any]:
        """Return the content with some of the tokens, whose new ids are their indices.

        Args:
            kept_ids: ids in ascending order, with all `mandatory` ones and those that they need.
        """
        new_ids = {old: new for new, old in enumerate(kept_ids)}
        content = copy.deepcopy({name: value for name, value in self.content.items() if name != "model"})
        model = {name: value for name, value in self._model.items() if name not in ("vocab", "merges")}
        kept = {token: new_ids[index] for token, index in self._model_ids.items() if index in new_ids}
        if isinstance(pieces := self._model["vocab"], list):
            model["vocab"] = [piece for piece in pieces if piece[0] in kept]
            if (unknown := model.get("unk_id")) is not None:
                model["unk_id"] = kept[pieces[unknown][0]]
        else:
            model["vocab"] = dict(sorted(kept.items(), key=lambda item: item[1]))
        if self.type == "BPE":
            model["merges"] = self._merges.among(kept)
        for token in content["added_tokens"]:
            token["id"] = new_ids[token["id"]]
        if content.get("padding"):
            content["padding"]["pad_id"] = new_ids.get(content["padding"]["pad_id"], 0)
        for step in _steps(content.get("post_processor")):
            _renumber(step, new_ids)
        return content | {"model": model}

    @cached_property
    def _merges(self) -> Merges:
        return Merges(self._model["merges"], self._prefix, self._suffix)

    def _characters(self, token: str) -> list[str]:
        return split_characters(token, self._prefix, self._suffix)

    def _has_characters(self, token: str) -> bool:
        return all(character in self._model_ids for character in self._characters(token))

    def _unknown_pieces(self) -> list[str]:
        if (index := self._model.get("unk_id")) is not None:
            return [self._model["vocab"][index][0]]
        unknown = self._model.get("unk_token")
        return [unknown] if unknown in self._model_ids else []

    def _space_characters(self) -> list[str]:
        """Return the characters that the decoder or pre-tokenizer exchanges with a space, `▁` of SentencePiece."""
        steps = [step for part in ("decoder", "pre_tokenizer") for step in _steps(self.content.get(part))]
        texts = [step.get("replacement") for step in steps]
        texts += [step["pattern"].get("String") for step in steps if isinstance(step.get("pattern"), dict)]
        return [text for text in texts if isinstance(text, str) and len(text) == 1 and text in self._model_ids]


def _steps(component: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """Yield the steps of a component of a tokenizer.json, in and outside of sequences."""
    if component is None:
        return
    yield component
    for name in ("normalizers", "pretokenizers", "processors", "decoders"):
        for step in component.get(name) or ():
            yield from _steps(step)


def _renumber(step: dict[str, Any], new_ids: dict[int, int]) -> None:
    """Replace the ids of the special tokens that a post-processor adds."""
    for name in ("sep", "cls"):
        if isinstance(step.get(name), list):
            step[name] = [step[name][0], new_ids[step[name][1]]]
    special = step.get("special_tokens")
    for token in special.values() if isinstance(special, dict) else ():
        token["ids"] = [new_ids[index] for index in token["ids"]]
