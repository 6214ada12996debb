"""Rows of a teacher with another tokenizer: against a naive reference, and for all kinds of batches."""

import pickle
import unicodedata
from functools import cache
from itertools import groupby

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import texts
from trained_tokenizers import KINDS, trained
from transformers import DataCollatorForLanguageModeling, DataCollatorWithFlattening

from hf_distill.core.aligned_inputs import aligned_keys
from hf_distill.data.alignment.collator import AlignedCollator
from hf_distill.data.alignment.teacher_rows import TeacherRowMaker
from hf_distill.data.collator import Collator
from hf_distill.errors import DistillError

PAIRS = [(one, other) for one in KINDS for other in KINDS if one in ("digits", "gemma", "first") or one == other]


@cache
def maker_of(student: str, teacher: str, **options) -> TeacherRowMaker:
    return TeacherRowMaker(trained(student), trained(teacher), **options)


def batch_of(*rows: list[int], labels=None) -> dict[str, torch.Tensor]:
    labels = labels or rows
    return Collator(0)([{"input_ids": ids, "labels": label} for ids, label in zip(rows, labels, strict=True)])


def ids_of(kind: str, text: str, bos: bool = True) -> list[int]:
    """Ids of a text without special tokens but BOS."""
    tokenizer = trained(kind)
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    return (tokenizer("")["input_ids"] if bos else []) + ids


def chunk_texts(maker: TeacherRowMaker, batch: dict, result: dict) -> list[tuple[bytes, bytes]]:
    """The text of both sides of each chunk; checks that each chunk is a span of one row."""
    keys = aligned_keys(maker.name)
    sides = []
    for ids, chunks, side in (
        (batch["input_ids"], result[keys.chunk_ids], maker.student),
        (result[keys.teacher_input_ids], result[keys.teacher_chunk_ids], maker.teacher),
    ):
        spans: dict[int, bytes] = {}
        for row_ids, row_chunks in zip(ids.tolist(), chunks.tolist(), strict=True):
            at = 0
            for chunk, tokens in groupby(row_chunks):
                count = len(list(tokens))
                if chunk:
                    assert chunk not in spans, "the tokens of a chunk follow each other"
                    spans[chunk] = b"".join(side.table.of_id(i) for i in row_ids[at : at + count])
                at += count
        assert list(spans) == list(range(1, 1 + len(spans)))
        sides.append(list(spans.values()))
    return list(zip(*sides, strict=True))


def naive_starts(table, ids: list[int], prefix: int) -> list[int]:
    """Where tokens start, and where the last one ends, without the space that was put before the text."""
    lengths = [len(table.of_id(i)) for i in ids]
    return [max(0, sum(lengths[:i]) - prefix) for i in range(len(ids) + 1)]


@settings(max_examples=150, deadline=None)
@given(text=texts(min_size=1))
def test_chunks_of_a_text_are_those_of_the_naive_reference(text):
    """Each side's own tokenizer reads the text; a boundary is the end of a token of both."""
    text = text.replace("▁", "_") or "a"
    for one, other in PAIRS:
        maker = maker_of(one, other)
        if "nfc" in (one, other) or (text.startswith(" ") and {one, other} & {"first", "always", "llama"}):
            continue
        student, teacher = ids_of(one, text), ids_of(other, text)
        result = maker(batch_of(student))
        assert result["teacher_input_ids"][0].tolist() == teacher
        expected = naive(maker, student, teacher)
        assert (result["chunk_ids"][0].tolist(), result["teacher_chunk_ids"][0].tolist()) == expected, (one, other)


def naive(maker: TeacherRowMaker, student: list[int], teacher: list[int]) -> tuple[list[int], list[int]]:
    sides, prefixes = [], []
    for ids, side in ((student, maker.student), (teacher, maker.teacher)):
        prefixes.append(side.rules.prefix_space != "never")
        bos = len(side.special.bos_ids)
        sides.append((bos, naive_starts(side.table, ids[bos:], prefixes[-1])))
    common = sorted(set(sides[0][1]) & set(sides[1][1]))
    chunks = [[0] * bos + [sum(b <= start for b in common) for start in starts[:-1]] for bos, starts in sides]
    unusable = {0, len(common), chunks[0][0], chunks[1][0]}
    if prefixes[0] != prefixes[1]:
        unusable |= {1}  # " Hello" is not the text "Hello" of the other side
    number = {chunk: i + 1 for i, chunk in enumerate(sorted(set(chunks[0]) - unusable))}
    return tuple([number.get(chunk, 0) for chunk in side] for side in chunks)


@settings(max_examples=60, deadline=None)
@given(text=texts(min_size=1))
def test_the_same_tokenizer_gives_one_chunk_for_each_token(text):
    text = unicodedata.normalize("NFC", text.replace("▁", "_")) or "a"
    for kind in KINDS:
        ids = ids_of(kind, text)
        result = maker_of(kind, kind)(batch_of(ids))
        assert result["teacher_input_ids"][0].tolist() == ids
        chunks = result["chunk_ids"][0].tolist()
        assert chunks == result["teacher_chunk_ids"][0].tolist()
        is_prefix = kind in ("first", "always", "llama") and trained(kind).convert_tokens_to_ids("▁") in ids[:2]
        assert chunks[0] == 0
        assert chunks[1 + is_prefix :] == list(range(chunks[-1] - len(ids) + 2 + is_prefix, chunks[-1] + 1))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_ids_give_smallest_chunks_with_the_text_of_both_sides(data):
    """Rows of random ids, or cut anywhere in a text: also inside characters and with special tokens."""
    one, other = data.draw(
        st.sampled_from([("digits", "gemma"), ("digits", "nfc"), ("gemma", "groups"), ("first", "digits")])
    )
    maker = maker_of(one, other)
    if data.draw(st.booleans()):
        ids = data.draw(st.lists(st.integers(0, len(trained(one)) - 1), min_size=1, max_size=20))
    else:
        ids = ids_of(one, data.draw(texts(min_size=2)) or "a")
        start = data.draw(st.integers(0, len(ids) - 1))
        ids = ids[start : data.draw(st.integers(start + 1, len(ids)))]
    labels = [i if data.draw(st.integers(0, 9)) else -100 for i in ids]
    batch = batch_of(ids, labels=[labels])
    result = maker(batch)
    for written, read in chunk_texts(maker, batch, result):
        assert canonical(written) == canonical(read) != b""
    targets = {chunk for chunk, label in zip(result["chunk_ids"][0].tolist(), labels, strict=True) if label == -100}
    assert targets <= {0}
    assert not set(inner_boundaries(maker, batch, result))


def canonical(text: bytes) -> bytes:
    try:
        return unicodedata.normalize("NFC", text.decode()).encode()
    except UnicodeDecodeError:
        return text


def inner_boundaries(maker: TeacherRowMaker, batch: dict, result: dict) -> list[int]:
    """Chunks with the same bytes on both sides, and a boundary of both inside them."""
    sides = []
    for ids, chunks, table in (
        (batch["input_ids"], result["chunk_ids"], maker.student.table),
        (result["teacher_input_ids"], result["teacher_chunk_ids"], maker.teacher.table),
    ):
        of_chunks: dict[int, list[bytes]] = {}
        for i, chunk in zip(ids.flatten().tolist(), chunks.flatten().tolist(), strict=True):
            of_chunks.setdefault(chunk, []).append(table.of_id(i))
        sides.append(
            {chunk: [b"".join(parts[:i]) for i in range(len(parts) + 1)] for chunk, parts in of_chunks.items()}
        )
    return [
        chunk
        for chunk, (starts, others) in {
            chunk: (sides[0][chunk], sides[1][chunk]) for chunk in sides[0] if chunk
        }.items()
        if starts[-1] == others[-1] and set(starts[1:-1]) & set(others[1:-1]) - {b"", b" "}
    ]


@settings(max_examples=60, deadline=None)
@given(st.lists(texts(min_size=1), min_size=2, max_size=4))
def test_padding_and_packing_change_nothing(rows):
    for one, other in (("digits", "gemma"), ("gemma", "nfc"), ("first", "groups")):
        maker = maker_of(one, other)
        ids = [ids_of(one, text or "a") for text in rows]
        expected = [comparable(maker(batch_of(each)), 0) for each in ids]
        for side in ("right", "left"):
            tokenizer = trained(one)
            tokenizer.padding_side, tokenizer.pad_token = side, tokenizer.eos_token
            padded = tokenizer.pad({"input_ids": ids}, return_tensors="pt")
            labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
            result = maker({**padded, "labels": labels})
            assert [comparable(result, i) for i in range(len(ids))] == expected, side
        packed = maker(DataCollatorWithFlattening()([{"input_ids": each, "labels": each} for each in ids]))
        assert "teacher_attention_mask" not in packed
        starts = (packed["teacher_position_ids"][0] == 0).nonzero().flatten().tolist()
        documents = zip(starts, [*starts[1:], None], strict=True)
        assert [packed["teacher_input_ids"][0, a:b].tolist() for a, b in documents] == [each[0] for each in expected]
        chunks = [
            relative(packed["teacher_chunk_ids"][0, a:b]) for a, b in zip(starts, [*starts[1:], None], strict=True)
        ]
        assert chunks == [each[2] for each in expected]


def comparable(result: dict, row: int) -> tuple[list[int], list[int], list[int]]:
    """The teacher's ids of a row, and its chunks of both sides counted from 1, without padding."""
    length = int(result["teacher_attention_mask"][row].sum())
    student = relative(result["chunk_ids"][row])
    return (
        result["teacher_input_ids"][row, :length].tolist(),
        [chunk for chunk in student if chunk],
        relative(result["teacher_chunk_ids"][row, :length]),
    )


def relative(chunks: torch.Tensor) -> list[int]:
    first = int(chunks[chunks > 0].min()) if (chunks > 0).any() else 1
    return [chunk and chunk - first + 1 for chunk in chunks.tolist()]


def test_documents_in_a_row_end_with_the_eos_of_the_teacher():
    one, two = "A first text, 12.", "Another one"
    end = trained("digits").eos_token_id
    ids = [*ids_of("digits", one), end, *ids_of("digits", two), end]
    result = maker_of("digits", "gemma")(batch_of(ids))
    eos = trained("gemma").eos_token_id
    assert result["teacher_input_ids"][0].tolist() == [*ids_of("gemma", one), eos, *ids_of("gemma", two), eos]
    chunks = dict(zip(ids, result["chunk_ids"][0].tolist(), strict=True))
    assert chunks[end] == result["teacher_chunk_ids"].max() > 0
    result = maker_of("digits", "groups")(batch_of(ids))
    eos = trained("groups").eos_token_id  # <|endoftext|>, although the teacher also has <|im_end|>
    assert result["teacher_input_ids"][0].tolist() == [*ids_of("groups", one), eos, *ids_of("groups", two), eos]
    assert result["chunk_ids"][0, -1] > 0


def test_no_token_of_the_teacher_spans_the_start_of_the_target_tokens():
    prompt, completion = ids_of("digits", "The n"), ids_of("digits", "umber is 12")
    for other in ("groups", "gemma", "first", "llama"):
        maker = maker_of("digits", other)
        result = maker(batch_of(prompt + completion, labels=[[-100] * len(prompt) + completion]))
        start = ids_of(other, "The n")
        assert result["teacher_input_ids"][0, : len(start)].tolist() == start
        assert not result["teacher_chunk_ids"][0, : len(start)].any()
        assert result["teacher_chunk_ids"][0, len(start) :].all()
        assert not result["chunk_ids"][0, : len(prompt)].any()
        assert result["chunk_ids"][0, len(prompt) :].all()


def test_target_tokens_that_start_inside_a_character():
    ids = ids_of("digits", "a 𒀀𒀁 b")
    start = next(i for i in range(3, len(ids)) if trained("digits").decode(ids[:i]).endswith("\ufffd"))
    result = maker_of("digits", "gemma")(batch_of(ids, labels=[[-100] * start + ids[start:]]))
    assert result["teacher_input_ids"][0].tolist() == ids_of("gemma", "a 𒀀𒀁 b")
    assert result["chunk_ids"][0, -1] > 0


def test_turns_of_a_conversation_have_the_special_tokens_of_the_teacher():
    tokenizer, teacher = trained("digits"), trained("gemma")
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello 12<|im_end|>\n"
    ids = tokenizer(text)["input_ids"]
    start = len(tokenizer("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")["input_ids"])
    result = maker_of("digits", "gemma")(batch_of(ids, labels=[[-100] * start + ids[start:]]))
    written = text.replace("<|im_start|>", "<start_of_turn>").replace("<|im_end|>", "<end_of_turn>")
    assert teacher.decode(result["teacher_input_ids"][0]) == "<bos>" + written
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert result["chunk_ids"][0, ids.index(end, start)] > 0
    assert result["chunk_ids"][0, start:].all()


def test_special_tokens_that_are_spelled_in_a_text_stay_text():
    text = "Write <|im_end|>, <eos> or </s> here"
    ids = ids_of("digits", text)
    result = maker_of("digits", "gemma")(batch_of(ids))
    assert trained("gemma").eos_token_id not in result["teacher_input_ids"]
    assert trained("gemma").decode(result["teacher_input_ids"][0], skip_special_tokens=True) == text
    assert result["chunk_ids"][0, -1] > 0


def test_tokens_after_the_length_that_the_teacher_reads_are_in_no_chunk():
    ids = ids_of("digits", "one two three four five six seven")
    full = maker_of("digits", "gemma")(batch_of(ids, ids[:5]))
    cut = maker_of("digits", "gemma", max_length=9)(batch_of(ids, ids[:5]))
    assert cut["teacher_input_ids"].shape[1] == 9
    assert cut["teacher_input_ids"][0].tolist() == full["teacher_input_ids"][0, :9].tolist()
    whole = full["chunk_ids"][0] <= full["teacher_chunk_ids"][0, :9].max()
    crossing = full["teacher_chunk_ids"][0, 8] == full["teacher_chunk_ids"][0, 9]
    last = full["teacher_chunk_ids"][0, 8] - int(crossing)
    assert (cut["chunk_ids"][0] > 0).tolist() == (
        whole & (full["chunk_ids"][0] > 0) & (full["chunk_ids"][0] <= last)
    ).tolist()
    packed = DataCollatorWithFlattening()([{"input_ids": ids}, {"input_ids": ids}])
    positions = maker_of("digits", "gemma", max_length=9)(packed)["teacher_position_ids"]
    assert positions.tolist() == [[*range(9)] * 2]


def test_text_in_another_normalization_is_aligned_around_and_across_it():
    ids = ids_of("digits", "a cafe\u0301 in 12")
    maker = maker_of("digits", "nfc")
    batch = batch_of(ids)
    result = maker(batch)
    assert trained("nfc").decode(result["teacher_input_ids"][0]) == "a café in 12"
    assert result["chunk_ids"][0, 1:].all()
    assert b"".join(student for student, _ in chunk_texts(maker, batch, result)) == " cafe\u0301 in 12".encode()


def given_rows(student: str, teacher: str, turns: list[tuple[str, bool]], teacher_turns=None, **options) -> dict:
    """A row of each side; of its texts, which are tokenized apart, some are target tokens."""
    rows = {}
    for prefix, kind, parts in (("", student, turns), ("teacher_", teacher, teacher_turns or turns)):
        ids = [
            (trained(kind)(text, add_special_tokens=False, **options)["input_ids"], target) for text, target in parts
        ]
        rows[f"{prefix}input_ids"] = [i for part, _ in ids for i in part]
        rows[f"{prefix}labels"] = [i if target else -100 for part, target in ids for i in part]
    return rows


def aligned_text(student: str, teacher: str, *rows: dict, **options) -> bytes:
    maker = TeacherRowMaker(trained(student), trained(teacher), **options)
    batch = Collator(0)(rows)
    return b"".join(one for one, _ in chunk_texts(maker, batch, maker(batch)))


def test_rows_of_the_teachers_template_are_aligned_at_the_target_tokens():
    turns = [
        ("<|im_start|>user\nHi<|im_end|>", False),
        ("Good day, 12<|im_end|>", True),
        ("user\nBye", False),
        ("Bye!<|im_end|>", True),
    ]
    own = [
        ("<bos><start_of_turn>user\nHi<end_of_turn>\n", False),
        ("Good day, 12<end_of_turn>", True),
        ("x", False),
        ("Bye!<end_of_turn>", True),
    ]
    row = given_rows("digits", "gemma", turns, own)
    assert aligned_text("digits", "gemma", row, row) == b"Good day, 12\xffendBye!\xffend" * 2
    stripped = [(text.replace("Good", " \nGood"), target) for text, target in turns]
    assert aligned_text("digits", "gemma", given_rows("digits", "gemma", stripped, own)).endswith(
        b"day, 12\xffendBye!\xffend"
    )
    other = [*own[:3], ("Something else<end_of_turn>", True)]
    assert aligned_text("digits", "gemma", given_rows("digits", "gemma", turns, other)) == b"Good day, 12\xffend\xffend"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(texts(min_size=1), texts(min_size=1)), min_size=1, max_size=3),
    st.sampled_from(["", " ", "\n\n", "é"]),
)
def test_target_tokens_of_two_templates_are_all_aligned_if_their_texts_are_the_same(turns, before):
    """If they differ, the common start is aligned up to its last common boundary, and the end from its first one."""
    turns = [(f"{prompt}Q", f"{answer}A") for prompt, answer in turns]
    one = [part for prompt, answer in turns for part in (("user " + prompt, False), (answer, True))]
    other = [part for prompt, answer in turns for part in (("<b>" + prompt, False), (before + answer, True))]
    split = {"split_special_tokens": True}
    maker = maker_of("digits", "groups")
    batch = Collator(0)([given_rows("digits", "groups", one, other, **split)] * 2)
    result = maker(batch)
    pairs = chunk_texts(maker, batch, result)
    assert all(student == teacher != b"" for student, teacher in pairs)
    expected = b"".join(naive_common_text(answer, before + answer) for _, answer in turns) * 2
    assert b"".join(student for student, _ in pairs) == expected
    if not before:
        assert expected == "".join(answer for _, answer in turns).encode() * 2
        assert result["chunk_ids"].bool().equal(batch["labels"] != -100)


def naive_common_text(text: str, teacher_text: str) -> bytes:
    """What is aligned of two turns: the common start and end of their bytes, up to a boundary of both tokenizers."""
    one, other = text.encode(), teacher_text.encode()
    maker, ends = maker_of("digits", "groups"), []
    for ids, side in (
        (ids_of("digits", text, bos=False), maker.student),
        (ids_of("groups", teacher_text, bos=False), maker.teacher),
    ):
        lengths = [len(side.table.of_id(i)) for i in ids]
        ends.append({sum(lengths[:i]) for i in range(len(lengths) + 1)})
    start = next((i for i, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1), len(one))
    rest, other_rest = one[start:][::-1], other[start:][::-1]
    end = next((i for i, pair in enumerate(zip(rest, other_rest, strict=False)) if len(set(pair)) > 1), len(rest))
    first = max(i for i in range(start + 1) if i in ends[0] and i in ends[1])
    last = max(i for i in range(end + 1) if len(one) - i in ends[0] and len(other) - i in ends[1])
    return one[:first] + one[len(one) - last :]


def test_a_batch_without_tokens():
    mask = torch.zeros(2, 3, dtype=torch.long)
    result = maker_of("digits", "always")({"input_ids": mask, "labels": mask - 100, "attention_mask": mask})
    assert result["teacher_attention_mask"].tolist() == [[1], [1]]
    assert not result["chunk_ids"].any()


def test_rows_of_the_teachers_template_with_another_number_of_turns():
    turns = [("a", False), ("First 12", True), ("b", False), ("Second 34", True)]
    assert aligned_text("digits", "groups", given_rows("digits", "groups", turns, turns[:2])) == b"First 12"
    assert aligned_text("digits", "groups", given_rows("digits", "groups", turns, turns[2:])) == b""
    cut = [*turns[:3], ("Sec", True)]
    assert aligned_text(
        "digits", "groups", given_rows("digits", "groups", cut, [*turns, ("c", False), ("Third", True)])
    ).startswith(b"First 12")


def test_the_rows_of_the_teacher_are_cut_at_its_length():
    turns = [("a b c", False), ("First 12 and more words", True)]
    row = given_rows("digits", "groups", turns)
    maker = TeacherRowMaker(trained("digits"), trained("groups"), max_length=len(row["teacher_input_ids"]) - 3)
    result = maker(Collator(0)([row]))
    assert result["teacher_input_ids"].tolist() == [row["teacher_input_ids"][:-3]]
    assert 0 < result["chunk_ids"].max() == result["teacher_chunk_ids"].max()


def test_packed_rows_have_no_rows_that_were_made_for_the_teacher():
    row = given_rows("digits", "groups", [("a", False), ("b", True)])
    packed = DataCollatorWithFlattening()([{"input_ids": [1, 2]}, {"input_ids": [3]}])
    batch = packed | {key: torch.tensor([row[key]]) for key in ("teacher_input_ids", "teacher_labels")}
    with pytest.raises(DistillError, match="Turn packing off"):
        maker_of("digits", "groups")(batch)


def test_a_batch_without_labels_is_refused():
    with pytest.raises(DistillError, match="labels"):
        maker_of("digits", "groups")({"input_ids": torch.tensor([[1, 2]])})


def test_rows_without_text_give_a_row_that_the_teacher_can_read():
    ids = [trained("digits").pad_token_id]
    tokenizer = trained("always")  # without BOS
    result = TeacherRowMaker(trained("digits"), tokenizer)(batch_of(ids, ids_of("digits", "some text")))
    assert result["teacher_attention_mask"].sum(1).min() >= 1
    assert not result["chunk_ids"][0].any()


def test_the_collator_adds_the_keys_of_each_teacher_in_workers():
    makers = [maker_of("digits", "gemma", name="a"), maker_of("digits", "nfc", name="b")]
    tokenizer = trained("digits")
    collator = AlignedCollator(DataCollatorForLanguageModeling(tokenizer, mlm=False), makers)
    rows = [{"input_ids": ids_of("digits", text)} for text in ("Some text, 12", "more")]
    batch = pickle.loads(pickle.dumps(collator))(rows)
    assert {*aligned_keys("a"), *aligned_keys("b")} - {
        "teacher_position_ids_a",
        "teacher_position_ids_b",
    } <= batch.keys()
    alone = makers[1](DataCollatorForLanguageModeling(tokenizer, mlm=False)(rows))
    assert all(torch.equal(value, batch[key]) for key, value in alone.items())
    assert collator.tokenizer is tokenizer
    with pytest.raises(DistillError, match="another name"):
        AlignedCollator(collator, [makers[0]] * 2)


def test_rows_that_were_made_for_the_teacher_lose_their_labels():
    row = given_rows("digits", "groups", [("a b", False), ("c 12", True)])
    batch = AlignedCollator(Collator(0), [maker_of("digits", "groups")])([row])
    assert "teacher_labels" not in batch
    assert batch["teacher_chunk_ids"].max() > 0
