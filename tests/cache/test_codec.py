"""What is encoded comes back, whatever it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_distill import DistillError
from hf_distill.cache.codec import Ragged, decode, dequantize_nats, encode, padded, quantize_nats


@st.composite
def ragged(draw, *vocabularies):
    """Some tokens' ids, ascending and distinct, from a vocabulary of any size."""
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
def test_an_example_comes_back(case):
    found, vocab = case
    again = decode([encode(found, vocab)], [len(found)], [len(found.ids)], vocab)
    assert same(found, again)


@settings(deadline=None, max_examples=50)
@given(st.lists(ragged(50_000), min_size=1, max_size=5))
def test_several_examples_come_back_one_after_another(cases):
    parts = [found for found, _ in cases]
    again = decode([encode(p, 50_000) for p in parts], [len(p) for p in parts], [len(p.ids) for p in parts], 50_000)
    names = ("sizes", "ids", "values", "extra")
    assert same(again, Ragged(*(np.concatenate([getattr(p, name) for p in parts]) for name in names)))


@settings(deadline=None, max_examples=50)
@given(ragged())
def test_rectangles_hold_each_token_s_own(case):
    found, _ = case
    ids, values, there = padded(found)
    assert there.sum(1).tolist() == found.sizes.tolist()
    assert ids[there].tolist() == found.ids.tolist()
    assert values[there].tolist() == found.values.tolist()
    assert not ids[~there].any()


@settings(deadline=None)
@given(st.lists(st.floats(0, 600), max_size=20))
def test_the_grid_is_off_by_half_a_step_at_most(nats):
    nats = np.array(nats)
    assert np.abs(dequantize_nats(quantize_nats(nats)) - np.clip(nats, 0, 511)).max(initial=0) <= 0.5 / 128 + 1e-4


def test_no_mass_is_no_mass():
    assert np.exp(-dequantize_nats(quantize_nats(np.array([np.inf])))) == 0


def test_other_bytes_are_refused():
    with pytest.raises(DistillError, match="cannot be decompressed"):
        decode([b"no such bytes"], [2], [3], 100)
