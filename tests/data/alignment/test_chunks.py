"""Chunks of two tokenizations: against a naive reference, on texts that are cut at random places."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import texts

from hf_distill.data.alignment.chunks import TokenSpans, align, number_chunks, share_coordinates


def spans(tokens: list[bytes]) -> TokenSpans:
    ends = np.cumsum([len(token) for token in tokens], dtype=np.int64)
    return TokenSpans.of_text(np.frombuffer(b"".join(tokens), np.uint8), ends)


def align_different(student: list[bytes], teacher: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    return align(*share_coordinates(spans(student), spans(teacher)))


def naive(student: list[bytes], teacher: list[bytes]) -> tuple[list[int], list[int]]:
    """The chunks of two sides with the same text; a token without text belongs to the chunk after it."""
    common = sorted(set(starts(student)) & set(starts(teacher)))
    chunks = []
    for tokens in (student, teacher):
        last = len(b"".join(tokens))
        chunks.append([0 if start == last else sum(b <= start for b in common) for start in starts(tokens)[:-1]])
    return chunks[0], chunks[1]


def starts(tokens: list[bytes]) -> list[int]:
    return [len(b"".join(tokens[:i])) for i in range(len(tokens) + 1)]


@st.composite
def cut(draw, data: bytes) -> list[bytes]:
    """A text in tokens that are cut at any byte; some have no text."""
    places = sorted(draw(st.lists(st.integers(0, len(data)), max_size=12)))
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


@given(st.data(), texts(max_size=5))
@settings(max_examples=200, deadline=None)
def test_chunks_of_the_same_text_are_those_of_the_naive_reference(data, text):
    student, teacher = (data.draw(cut(text.encode())) for _ in range(2))
    chunks = [each.tolist() for each in align(spans(student), spans(teacher))]
    assert chunks == [each.tolist() for each in number_chunks(spans(student), spans(teacher))]
    assert chunks == list(naive(student, teacher))


@given(st.data(), *[texts(max_size=3)] * 4)
@settings(max_examples=200, deadline=None)
def test_different_texts_are_aligned_at_their_common_start_and_end(data, start, one, other, end):
    student, teacher = (data.draw(cut((start + middle + end).encode())) for middle in (one, other))
    chunks = [each.tolist() for each in align_different(student, teacher)]
    for number in range(1, 1 + max(chunks[0], default=0)):
        texts_ = [
            b"".join(token for token, chunk in zip(tokens, side, strict=True) if chunk == number)
            for tokens, side in zip((student, teacher), chunks, strict=True)
        ]
        assert texts_[0] == texts_[1] != b""
    # Every chunk of the naive reference that lies in the common start is there, too.
    prefix = len(start.encode())
    for tokens, side in zip((student, teacher), chunks, strict=True):
        known = naive_prefix(student, teacher, prefix)
        for begin, token, chunk in zip(starts(tokens), tokens, side, strict=False):
            if token and begin + len(token) <= max(known):
                assert chunk == sum(b <= begin for b in known), (tokens, side, known)


def naive_prefix(student: list[bytes], teacher: list[bytes], prefix: int) -> list[int]:
    """The common boundaries in the first bytes of both sides."""
    return [b for b in sorted(set(starts(student)) & set(starts(teacher))) if b <= prefix]


def test_a_template_that_strips_white_space_leaves_the_rest_aligned():
    student, teacher = [b"\n", b"Good", b" mor", b"ning"], [b"Go", b"od", b" morning"]
    chunks = align_different(student, teacher)
    assert [each.tolist() for each in chunks] == [[0, 1, 2, 2], [1, 1, 2]]


def test_texts_that_differ_in_the_middle_have_no_chunk_there():
    student, teacher = [b"a", b"b", b"c", b"d"], [b"a", b"XY", b"c", b"d"]
    assert [each.tolist() for each in align_different(student, teacher)] == [[1, 0, 2, 3], [1, 0, 2, 3]]
    student, teacher = [b"a", b"c"], [b"a", b"b", b"c"]
    assert [each.tolist() for each in align_different(student, teacher)] == [[1, 2], [1, 0, 2]]
