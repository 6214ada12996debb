"""The key of an example depends on its content, and not on its position in a batch."""

from itertools import pairwise

import pytest
import torch
from tiny import collate, rows

from hf_distill.cache import batch_examples
from hf_distill.core.targets import Targets
from hf_distill.data import Collator


def keys(batch, shift=True):
    return [e.key for e in batch_examples(batch, Targets.from_batch(batch, shift))]


def documents(n=6):
    g = torch.Generator().manual_seed(3)
    lengths = [5, 9, 3, 7, 4, 8][:n]
    ids = [torch.randint(3, 90, (size,), generator=g).tolist() for size in lengths]
    return [{"input_ids": x, "labels": [-100] * (i % 3) + x[i % 3 :]} for i, x in enumerate(ids)]


@pytest.mark.parametrize("kind", ["llama", "bert", "token", "sequence"])
def test_padding_and_order_do_not_change_the_key(kind):
    shift = kind == "llama"
    right, left = rows(kind, 8, pad="right"), rows(kind, 8, pad="left")
    first = keys(collate(right), shift)
    wide = [{k: torch.nn.functional.pad(v, (0, 3), value=-100 if k == "labels" else 0) if v.dim() else v
             for k, v in row.items()} for row in right]  # fmt: skip
    assert keys(collate(wide), shift) == first
    assert keys(collate(left), shift) == first
    assert keys(collate(right[::-1]), shift) == first[::-1]
    assert [key for row in right for key in keys(collate([row]), shift)] == first


def test_a_packed_document_has_the_key_of_the_unpacked_row():
    collator, alone = Collator(0), documents()
    packed = [
        {
            "input_ids": [token for d in alone[a:b] for token in d["input_ids"]],
            "labels": [label for d in alone[a:b] for label in d["labels"]],
            "seq_lengths": [len(d["input_ids"]) for d in alone[a:b]],
        }
        for a, b in ((0, 3), (3, 4), (4, 6))
    ]
    assert keys(collator(packed)) == keys(collator(alone))


def test_examples_cover_the_target_tokens_in_order():
    batch = Collator(0)(documents())
    targets = Targets.from_batch(batch, shift=True)
    spans = [e.target_slice for e in batch_examples(batch, targets)]
    assert spans[0].start == 0
    assert spans[-1].stop == len(targets)
    assert all(a.stop == b.start for a, b in pairwise(spans))


@pytest.mark.parametrize(
    "change",
    [
        lambda row: row["input_ids"].__setitem__(2, 91),
        lambda row: row["labels"].__setitem__(2, 91),
        lambda row: row["labels"].__setitem__(2, -100),
        lambda row: (row["input_ids"].pop(), row["labels"].pop()),
    ],
    ids=["another token", "another label", "no target", "shorter"],
)
def test_tokens_and_labels_change_the_key(change):
    before, after = documents(1), documents(1)
    change(after[0])
    assert keys(Collator(0)(before)) != keys(Collator(0)(after))


def test_inputs_of_encoder_and_decoder_change_the_key():
    data = rows("t5", 6)
    first = keys(collate(data), shift=False)
    other = [{**row, "input_ids": row["input_ids"].clone()} for row in data]
    other[2]["input_ids"][0] = 96
    changed = [a != b for a, b in zip(first, keys(collate(other), shift=False), strict=True)]
    assert changed == [False, False, True, False, False, False]


def test_model_inputs_other_than_ids_change_the_key():
    """Rows of the same text with other images or token types have other keys; padding does not change the key."""
    ids, labels = torch.tensor([[5, 6, 7, 0]]), torch.tensor([2])
    mask, types = torch.tensor([[1, 1, 1, 0]]), torch.tensor([[0, 0, 1, 0]])
    targets = Targets.from_batch({"labels": labels}, shift=False)

    def key(**inputs):
        return batch_examples({"labels": labels, **inputs}, targets)[0].key

    plain = key(input_ids=ids, attention_mask=mask)
    typed = key(input_ids=ids, attention_mask=mask, token_type_ids=types)
    assert plain == key(input_ids=ids[:, :3])
    assert typed == key(input_ids=ids[:, :3], token_type_ids=types[:, :3])
    assert len({plain, typed, key(input_ids=ids, attention_mask=mask, token_type_ids=types * 0)}) == 3
    one, other = torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert key(pixel_values=one) == key(pixel_values=one.clone()) != key(pixel_values=other)
    packed = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    packed |= {"labels": packed["input_ids"], "token_type_ids": torch.tensor([[0, 1, 1, 1]])}
    alone = {"input_ids": torch.tensor([[7, 8]]), "token_type_ids": torch.tensor([[1, 1]])}
    alone["labels"] = alone["input_ids"]
    assert keys(packed, True)[1] == keys(alone, True)[0]
