"""Decoding returns what was encoded, for any ids and values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill import DistillError
from hf_distill.cache.codec import Ragged, decode, dequantize_nats, encode, pad, quantize_nats


@st.composite
def ragged(draw, *vocabularies):
    """Draw ascending, distinct ids of several tokens, and a vocabulary size."""
    size = draw(st.sampled_from(vocabularies or (1, 7, 300, 65536, 65537, 151936, 262144)))
    rows = draw(st.lists(st.sets(st.integers(0, size - 1), max_size=12), max_size=9))
    sizes = np.array([len(row) for row in rows], dtype=np.uint16)
    ids = np.array([i for row in rows for i in sorted(row)], dtype=np.int64)
    numbers = st.integers(0, 65535)
    values = np.array(draw(st.lists(numbers, min_size=len(ids), max_size=len(ids))), dtype=np.uint16)
    extra = np.array(draw(st.lists(numbers, min_size=len(rows), max_size=len(rows))), dtype=np.uint16)
    return Ragged(sizes, ids, values, extra), size


def same(a: Ragged, b: Ragged) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("sizes", "ids", "values", "extra"))


@settings(deadline=None, max_examples=200)
@given(ragged())
def test_decode_returns_the_encoded_example(case):
    example, vocab = case
    decoded = decode([encode(example, vocab)], [len(example)], [len(example.ids)], vocab)
    assert same(example, decoded)


@settings(deadline=None, max_examples=50)
@given(st.lists(ragged(50_000), min_size=1, max_size=5))
def test_decode_concatenates_several_examples(cases):
    parts = [example for example, _ in cases]
    decoded = decode([encode(p, 50_000) for p in parts], [len(p) for p in parts], [len(p.ids) for p in parts], 50_000)
    names = ("sizes", "ids", "values", "extra")
    assert same(decoded, Ragged(*(np.concatenate([getattr(p, name) for p in parts]) for name in names)))


@settings(deadline=None, max_examples=50)
@given(ragged())
def test_pad_returns_the_ids_and_values_of_each_token(case):
    example, _ = case
    ids, values, is_filled = pad(example)
    assert is_filled.sum(1).tolist() == example.sizes.tolist()
    assert ids[is_filled].tolist() == example.ids.tolist()
    assert values[is_filled].tolist() == example.values.tolist()
    assert not ids[~is_filled].any()


@settings(deadline=None)
@given(st.lists(st.floats(0, 600), max_size=20))
def test_quantization_errs_by_at_most_half_a_step(nats):
    nats = np.array(nats)
    assert np.abs(dequantize_nats(quantize_nats(nats)) - np.clip(nats, 0, 511)).max(initial=0) <= 0.5 / 128 + 1e-4


def test_infinite_nats_are_dequantized_to_zero_mass():
    assert np.exp(-dequantize_nats(quantize_nats(np.array([np.inf])))) == 0


def test_bytes_of_another_format_are_refused():
    with pytest.raises(DistillError, match="cannot be decompressed"):
        decode([b"no such bytes"], [2], [3], 100)
