"""Classes of two vocabularies, and special tokens that mean the same: against a naive reference."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from trained_tokenizers import KINDS, trained
from transformers import PreTrainedTokenizerFast

from hf_distill.data.alignment.special_tokens import common_thinking_marks, special_tokens
from hf_distill.data.alignment.token_classes import token_classes
from hf_distill.data.alignment.tokenizer_text import tokenizer_pair


def byte_level(words: list[str], special: list[str] = (), thinking: list[str] = (), **names: str):
    """A tokenizer of all bytes and of a few words, without merges."""
    vocabulary = {token: i for i, token in enumerate([*pre_tokenizers.ByteLevel.alphabet(), *words])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token) for token in thinking])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def class_of(classes: torch.Tensor, tokenizer, token: str) -> int:
    return int(classes[tokenizer.convert_tokens_to_ids(token)])


def test_numbers_that_are_grouped_differently_are_in_the_class_of_their_first_digit():
    student, teacher = byte_level(["12", "123", "Ġthe", "Ġthem", "ab"]), byte_level(["Ġthe", "Ġthey"])
    classes = token_classes(student, teacher)
    of = {
        token: class_of(classes.student, student, token)
        for token in ("1", "12", "123", "2", "Ġthe", "Ġthem", "a", "ab")
    }
    assert of["1"] == of["12"] == of["123"] == class_of(classes.teacher, teacher, "1")
    assert (
        of["Ġthem"]
        == of["Ġthe"]
        == class_of(classes.teacher, teacher, "Ġthe")
        == class_of(classes.teacher, teacher, "Ġthey")
    )
    assert of["ab"] == of["a"]
    assert len({of["1"], of["2"], of["Ġthe"], of["a"]}) == 4
    assert classes.count == 256 + 1 + 1


def naive(student, teacher) -> list[list[list[int]]]:
    """The ids of both sides in each class but the last, by loops over bytes."""
    sides = tokenizer_pair(student, teacher)
    texts = [
        {i: side.table.of_id(i) for i in range(side.table.size) if not side.table.is_special[i] and side.table.of_id(i)}
        for side in sides
    ]
    common = set(texts[0].values()) & set(texts[1].values())
    groups: dict[bytes, list[set[int]]] = {key: [set(), set()] for key in common}
    for k, side in enumerate(texts):
        for i, text in side.items():
            known = [text[:n] for n in range(1, len(text) + 1) if text[:n] in common]
            if known:
                groups[max(known, key=len)][k].add(i)
    return sorted([sorted(ids) for ids in group] for group in groups.values())


@pytest.mark.parametrize(
    ("one", "other"), [("digits", "groups"), ("digits", "gemma"), ("gemma", "first"), ("groups", "llama")]
)
def test_the_partition_is_that_of_the_naive_reference(one, other):
    student, teacher = trained(one), trained(other)
    classes = token_classes(student, teacher)
    special = {*special_tokens(student).contents}, {*special_tokens(teacher).contents}
    groups = [
        [
            set((ids == k).nonzero().flatten().tolist()) - special[side]
            for side, ids in enumerate((classes.student, classes.teacher))
        ]
        for k in range(classes.count - 1)
    ]
    assert sorted([sorted(ids) for ids in group] for group in groups if all(group)) == naive(student, teacher)
    assert classes.student.shape == (len(student),)
    assert classes.teacher.max() < classes.count


@pytest.mark.parametrize("kind", KINDS)
def test_each_id_of_the_same_tokenizer_is_a_class(kind):
    size = len(trained(kind))
    classes = token_classes(trained(kind), trained(kind), size, size + 20)
    assert classes.student.tolist() == classes.teacher[:size].tolist() == list(range(size))
    assert classes.teacher[size:].tolist() == [classes.count - 1] * 20
    assert classes.count == size + 1


def test_padded_and_cut_vocabularies():
    student, teacher = trained("digits"), trained("gemma")
    classes = token_classes(student, teacher, len(student) + 5, len(teacher) - 5)
    assert classes.student.shape == (len(student) + 5,)
    assert classes.student[-5:].tolist() == [classes.count - 1] * 5
    assert classes.teacher.shape == (len(teacher) - 5,)
    assert set(range(classes.count - 1)) <= set(classes.student.tolist()) & set(classes.teacher.tolist())


def test_special_tokens_are_one_class_by_string_first_and_by_meaning_else():
    student, teacher = trained("digits"), trained("gemma")
    classes = token_classes(student, teacher)
    pairs = {"<|endoftext|>": "<eos>", "<|im_end|>": "<end_of_turn>", "<|im_start|>": "<start_of_turn>"}
    for one, other in pairs.items():
        assert class_of(classes.student, student, one) == class_of(classes.teacher, teacher, other) < classes.count - 1
    for token in ("<pad>", "<bos>", "<unk>"):
        assert class_of(classes.teacher, teacher, token) == classes.count - 1

    teacher = trained("llama")  # one token ends turns and texts
    classes = token_classes(student, teacher)
    ends = {class_of(classes.student, student, token) for token in ("<|endoftext|>", "<|im_end|>")}
    assert ends == {class_of(classes.teacher, teacher, "</s>")}
    classes = token_classes(teacher, student)
    assert (
        ends == {class_of(classes.teacher, student, token) for token in ("<|endoftext|>", "<|im_end|>")}
        or len(ends) == 1
    )


def test_a_marker_of_a_special_token_is_no_text():
    """The byte 0xFF is an id of both, and the first byte of markers."""
    student, teacher = byte_level([], ["<odd>"]), byte_level(["ab"], ["<other>"])
    classes = token_classes(student, teacher)
    assert class_of(classes.student, student, "<odd>") == classes.count - 1
    assert class_of(classes.student, student, "ÿ") == class_of(classes.teacher, teacher, "ÿ") < classes.count - 1


def test_thinking_marks_are_special_tokens_if_both_have_them():
    thinking = byte_level([], ["<|im_end|>"], ["<think>", "</think>"], eos_token="<|im_end|>")
    other = byte_level([], ["<eos>", "[THINK]", "[/THINK]"], eos_token="<eos>")
    plain = byte_level([], ["<eos>"], eos_token="<eos>")
    assert len(common_thinking_marks(thinking, other)) == 2
    assert not common_thinking_marks(thinking, plain)
    mark = thinking.convert_tokens_to_ids("<think>")
    assert tokenizer_pair(thinking, plain)[0].table.of_id(mark) == b"<think>"
    student, teacher = tokenizer_pair(thinking, other)
    assert student.table.of_id(mark) == teacher.table.of_id(other.convert_tokens_to_ids("[THINK]")) != b"<think>"
    classes = token_classes(thinking, other)
    assert classes.student[mark] == class_of(classes.teacher, other, "[THINK]") < classes.count - 1


def test_padding_matches_nothing_and_an_unknown_eos_is_an_end():
    tokenizer = byte_level([], ["<odd end>", "<pad>"], eos_token="<odd end>", pad_token="<pad>")
    special = special_tokens(tokenizer)
    assert special.marker(special.eos_id) == special_tokens(trained("gemma")).marker(trained("gemma").eos_token_id)
    assert special.unmatched == {tokenizer.pad_token_id}
    assert special.bos_ids == ()
    assert special_tokens(trained("llama")).bos_ids == (trained("llama").bos_token_id,)
