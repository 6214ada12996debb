"""Views against what they say, token by token, on rows of every kind and layout."""

import logging
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from tiny import build, collate, rows
from transformers import DataCollatorWithFlattening

from hf_distill import DistillError
from hf_distill.core.targets import Targets
from hf_distill.data import Collator, mix, mix_scheduled, pack, tokenize_dataset
from hf_distill.data.formats import PARAPHRASE
from hf_distill.recipe.smoke import byte_tokenizer
from hf_distill.teachers.multi_view import BatchView, replacement_token_id

FILL = 1
KINDS = {"llama": True, "bert": False, "token": False, "t5": False, "sequence": False}  # -> whether labels are shifted
ALL = BatchView(token_dropout=0.3, span_deletion=0.4, prepend_context_tokens=3)


def apply(view: BatchView, kind: str, batch: dict, step: int = 0) -> tuple[Targets, dict, Targets]:
    """(targets of the batch, the batch in the view, its targets); the batch must stay as it was."""
    before = {name: value.clone() for name, value in batch.items()}
    targets = Targets.from_batch(batch, KINDS[kind])
    inputs, moved = view(batch, targets, step, FILL, encoder=kind == "t5")
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    return targets, inputs, moved


def tokens_of_row(batch: dict, row: int) -> list[int]:
    return batch["input_ids"][row][batch["attention_mask"][row] != 0].tolist()


def long_rows(count: int = 8, length: int = 500, prompt: int = 400, seed: int = 3) -> dict:
    """Causal rows of distinct-looking tokens, of which the last are target tokens."""
    ids = torch.randint(3, 97, (count, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize(
    "view", [BatchView(token_dropout=0.3), BatchView(span_deletion=0.4), BatchView(prepend_context_tokens=3), ALL]
)
def test_the_target_tokens_are_the_same_in_every_view(kind, pad, view):
    batch = collate(rows(kind, 6, pad=pad))
    targets, inputs, moved = apply(view, kind, batch)
    assert torch.equal(moved.labels, targets.labels)
    assert torch.equal(moved.batch_rows, targets.batch_rows)
    again = Targets.from_batch(inputs, KINDS[kind])
    assert torch.equal(again.positions, moved.positions)
    assert torch.equal(again.labels, moved.labels)
    assert again.shape == moved.shape
    if kind == "llama":
        after = inputs["input_ids"].flatten()[moved.positions + 1]
        assert torch.all((after == moved.labels) | (after == FILL))
        assert torch.all((after == FILL) <= (view.token_dropout > 0))
    if kind in ("t5", "sequence"):
        assert moved is targets


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_a_view_stand_at_its_new_target_positions(kind):
    batch, model = collate(rows(kind, 4)), build(kind, 0).eval()
    targets, inputs, moved = apply(ALL, kind, batch)
    logits = moved.gather(model(**inputs).logits)
    assert len(logits) == len(targets)
    assert not torch.allclose(logits, targets.gather(model(**batch).logits))


@torch.no_grad()
def test_a_masked_context_does_not_change_the_logits():
    batch, model = collate(rows("llama", 4, pad="left")), build("llama", 0).eval()  # its positions are relative
    targets, inputs, moved = apply(BatchView(prepend_context_tokens=4), "llama", batch)
    added = (inputs["attention_mask"].cumsum(1) <= 4) & (inputs["attention_mask"] != 0)
    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(added, 0)
    torch.testing.assert_close(moved.gather(model(**inputs).logits), targets.gather(model(**batch).logits))


def test_the_shares_of_dropped_and_hidden_tokens_are_exact_on_average():
    batch = long_rows()
    _, inputs, _ = apply(BatchView(token_dropout=0.2), "llama", batch)
    assert abs((inputs["input_ids"] == FILL).double().mean() - 0.2) < 0.02
    _, inputs, _ = apply(BatchView(span_deletion=0.3, span_length=4), "llama", batch)
    hidden = inputs["attention_mask"][:, 1:399] == 0
    assert abs(hidden.double().mean() - 0.3) < 0.04
    runs = (hidden[:, 1:] != hidden[:, :-1]).sum() / 2  # a span meets another in 3 of 10 cases
    assert 0.8 < runs * 4 / 0.7 / hidden.sum() < 1.2


@pytest.mark.parametrize(
    ("view", "changed"), [(BatchView(token_dropout=0.3), "input_ids"), (BatchView(span_deletion=0.3), "attention_mask")]
)
def test_the_view_of_a_row_depends_on_its_tokens_and_the_step_only(view, changed):
    row = {name: value[:1] for name, value in long_rows(length=60, prompt=40).items()}
    zeros = torch.zeros(1, 7, dtype=torch.long)
    _, alone, _ = apply(view, "llama", row)
    expected = alone[changed][0]
    assert not torch.equal(expected, row[changed][0])
    for left, right in ((0, 7), (7, 0), (3, 4)):
        values = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        padded = {k: torch.nn.functional.pad(v, (left, right), value=values[k]) for k, v in row.items()}
        other = long_rows(count=2, length=67, prompt=5, seed=9)
        batch = {name: torch.cat([other[name], padded[name]]) for name in padded}
        _, inputs, _ = apply(view, "llama", batch)
        assert torch.equal(inputs[changed][2, left : 67 - right], expected)
        padding = batch["attention_mask"][2] == 0
        assert torch.equal(inputs[changed][2, padding], zeros[0])
    unmasked = {name: value for name, value in row.items() if name != "attention_mask"}
    assert torch.equal(apply(view, "llama", unmasked)[1][changed][0], expected)
    assert not torch.equal(apply(view, "llama", row, step=1)[1][changed][0], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["left", "right"])
def test_only_context_is_hidden_and_a_row_keeps_its_first_token(kind, pad):
    batch, hidden_ever = collate(rows(kind, 16, pad=pad)), 0
    real = batch["attention_mask"] != 0
    if kind == "llama":
        batch["labels"][real.cumsum(1) <= 5] = -100
    shown = {(row, int(real[row].nonzero()[0])) for row in range(16)}
    if kind in ("llama", "bert", "token"):
        for row, column in (batch["labels"] != -100).nonzero().tolist():
            shown.add((row, column))
            if kind == "llama" and column:
                shown.add((row, column - 1))
    for step in range(20):
        targets = Targets.from_batch(batch, KINDS[kind])
        view = BatchView(token_dropout=0.9, span_deletion=0.9, span_length=2)
        inputs, _ = view(batch, targets, step, FILL, encoder=kind == "t5")
        hidden = {tuple(at) for at in ((inputs["attention_mask"] == 0) & real).nonzero().tolist()}
        assert not hidden & shown
        hidden_ever += len(hidden)
        assert torch.equal(inputs["attention_mask"][~real], batch["attention_mask"][~real])
        assert torch.equal(inputs["input_ids"][~real], batch["input_ids"][~real])
        first = real.int().argmax(1, keepdim=True)
        assert torch.equal(inputs["input_ids"].gather(1, first), batch["input_ids"].gather(1, first))
    assert hidden_ever > 100


@pytest.mark.parametrize("pad", ["left", "right"])
def test_the_first_tokens_of_the_next_row_are_prepended(pad):
    batch = collate(rows("llama", 5, pad=pad)) | {"source": torch.zeros(5, 12, dtype=torch.long)}
    mask = batch["attention_mask"]
    batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    batch["token_type_ids"] = mask.clone()
    _, inputs, _ = apply(BatchView(prepend_context_tokens=3), "llama", batch)
    for row in range(5):
        expected = tokens_of_row(batch, (row + 1) % 5)[:3] + tokens_of_row(batch, row)
        assert tokens_of_row(inputs, row) == expected
        is_token = inputs["attention_mask"][row] != 0
        assert inputs["position_ids"][row][is_token].tolist() == list(range(len(expected)))
        assert inputs["token_type_ids"][row][is_token].tolist() == [0] * 3 + [1] * (len(expected) - 3)
        assert inputs["attention_mask"][row, 0 if pad == "right" else -1] == 1
    assert inputs["source"] is batch["source"]
    shortest = int(mask.sum(1).min())
    _, inputs, _ = apply(BatchView(prepend_context_tokens=99), "llama", batch)
    assert inputs["input_ids"].shape == (5, 12 + shortest)
    unmasked = {name: batch[name][:2, -4:] for name in ("input_ids", "labels")}
    assert "attention_mask" not in apply(BatchView(prepend_context_tokens=2), "llama", unmasked)[1]


def test_a_batch_of_one_row_has_no_context_to_prepend():
    batch = collate(rows("llama", 1))
    targets, inputs, moved = apply(BatchView(prepend_context_tokens=3), "llama", batch)
    assert moved is targets
    assert torch.equal(inputs["input_ids"], batch["input_ids"])


def test_prepended_tokens_are_not_dropped_and_do_not_change_the_random_numbers():
    batch = long_rows(count=3, length=40, prompt=30)
    drop = BatchView(token_dropout=0.5, span_deletion=0.3)
    _, alone, _ = apply(drop, "llama", batch)
    _, behind, _ = apply(BatchView(token_dropout=0.5, span_deletion=0.3, prepend_context_tokens=6), "llama", batch)
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(behind[name][:, 6:], alone[name])
    assert torch.equal(behind["input_ids"][:, :6], batch["input_ids"][:, :6].roll(-1, 0))


def test_shifted_labels_of_a_collator_are_read():
    batch = long_rows(count=3, length=40, prompt=20)
    shifted = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100)
    other = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "shift_labels": shifted}
    _, inputs, moved = apply(ALL, "llama", batch)
    _, again, same = apply(ALL, "llama", other)
    assert torch.equal(again["attention_mask"], inputs["attention_mask"])
    assert torch.equal(same.positions, moved.positions)
    assert torch.equal(Targets.from_batch(again, True).positions, moved.positions)


def packed_batch() -> dict:
    documents = [{"input_ids": [5 + i] * size, "labels": [5 + i] * size} for i, size in enumerate((4, 9, 1, 6))]
    return DataCollatorWithFlattening()(documents)


def test_packed_documents_drop_tokens_but_not_their_first():
    batch, ever = packed_batch(), torch.zeros(1, 20, dtype=torch.bool)
    for step in range(30):
        targets, inputs, moved = apply(BatchView(token_dropout=0.5), "llama", batch, step)
        assert moved is targets
        assert "attention_mask" not in inputs
        ever |= inputs["input_ids"] == FILL
    assert torch.equal(ever, batch["position_ids"] != 0)


@pytest.mark.parametrize("name", ["span_deletion", "prepend_context_tokens"])
def test_packed_rows_are_refused_for_views_that_hide_or_prepend_tokens(name):
    view = BatchView.parse({name: 0.5 if name == "span_deletion" else 2})
    with pytest.raises(DistillError, match=f"view has {name}, which does not work with packed rows"):
        apply(view, "llama", packed_batch())


def paired(i: int) -> dict:
    return {"prompt": f"{i} and {i} are", "paraphrase": f"What do {i} and {i} make?", "completion": f" {i + i}."}


def test_the_paraphrase_has_the_same_target_tokens():
    tokenizer = byte_tokenizer()
    data = Dataset.from_list([paired(i) for i in (1, 30, 700)])
    made = tokenize_dataset(data, tokenizer, 64, second_prompt=PARAPHRASE)
    for example, row in zip(data, made, strict=True):
        completion = example["completion"] + "<|end|>"
        assert tokenizer.decode(row["input_ids"]) == example["prompt"] + completion
        assert tokenizer.decode(row["view_input_ids"]) == example["paraphrase"] + completion
        for name in ("labels", "view_labels"):
            assert tokenizer.decode([label for label in row[name] if label != -100]) == completion
    batch = Collator(tokenizer.pad_token_id)(list(made))
    assert batch["view_attention_mask"].sum(1).tolist() == [len(row["view_input_ids"]) for row in made]
    targets, inputs, moved = apply(BatchView(paraphrase=True), "llama", batch)
    assert not inputs.keys() & {"view_input_ids", "view_attention_mask", "view_labels"}
    assert torch.equal(moved.labels, targets.labels)
    assert torch.equal(inputs["input_ids"].flatten()[moved.positions + 1], targets.labels)
    _, inputs, moved = apply(BatchView(paraphrase=True, prepend_context_tokens=5), "llama", batch)
    assert torch.equal(inputs["input_ids"].flatten()[moved.positions + 1], targets.labels)
    assert tokenizer.decode(tokens_of_row(inputs, 0)[:5]) == "What "


def test_paraphrases_of_conversations_follow_the_template():
    tokenizer = byte_tokenizer()
    turns = [
        [{"role": role, "content": text}] for role, text in (("user", "Sum?"), ("user", "Add up!"), ("assistant", "4"))
    ]
    example = dict(zip(("prompt", "paraphrase", "completion"), turns, strict=True))
    (row,) = tokenize_dataset(Dataset.from_list([example]), tokenizer, 64, second_prompt=PARAPHRASE)
    assert tokenizer.decode(row["view_input_ids"]) == "user: Add up!\nassistant: 4<|end|>"
    assert tokenizer.decode([label for label in row["view_labels"] if label != -100]) == "4<|end|>"


def test_truncation_keeps_the_target_tokens_that_both_prompts_have():
    tokenizer = byte_tokenizer()
    examples = [
        {"prompt": "ab", "paraphrase": "abcd", "completion": "0123456789"},
        {"prompt": "abcd", "paraphrase": "ab", "completion": "0123456789"},
        {"prompt": "ab", "paraphrase": "abcdefgh", "completion": "0123456789"},
        {"prompt": "", "paraphrase": "ab", "completion": "0123"},
    ]
    made = tokenize_dataset(Dataset.from_list(examples), tokenizer, 8, second_prompt=PARAPHRASE)
    for row in made:
        target_tokens, view = ([label for label in row[name] if label != -100] for name in ("labels", "view_labels"))
        assert target_tokens == view
        assert max(len(row["input_ids"]), len(row["view_input_ids"])) <= 8
    texts = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in made]
    assert texts == ["0123", "0123"]  # the third asks nothing of 8 tokens; nothing predicts the first of the fourth
    short = tokenize_dataset(Dataset.from_list(examples[:3]), tokenizer, 15, overflow="drop", second_prompt=PARAPHRASE)
    assert short["input_ids"] == tokenizer(["ab0123456789<|end|>", "abcd0123456789<|end|>"])["input_ids"]


def test_paraphrases_are_read_only_on_request():
    (row,) = tokenize_dataset(Dataset.from_list([paired(3)]), byte_tokenizer(), 64)
    assert set(row) == {"input_ids", "labels"}
    assert set(Collator(0)([row])) == {"input_ids", "labels"}


def test_sources_with_and_without_paraphrases_do_not_mix():
    tokenizer, data = byte_tokenizer(), Dataset.from_list([paired(i) for i in range(4)])
    both = {
        "task": tokenize_dataset(data, tokenizer, 64, second_prompt=PARAPHRASE),
        "general": tokenize_dataset(data, tokenizer, 64),
    }
    with pytest.raises(DistillError, match="The sources general have no paraphrase, but"):
        mix(both, {"task": 1.0, "general": 1.0}, seed=0)
    with pytest.raises(DistillError, match="The sources general have no paraphrase, but"):
        mix_scheduled(both, {"task": ((0.0, 1.0),), "general": ((0.0, 1.0),)}, seed=0, count=4)
    mixed = mix({"a": both["task"], "b": both["task"]}, {"a": 1.0, "b": 1.0}, seed=0)
    assert {"view_input_ids", "view_labels", "source"} <= set(mixed.column_names)
    with pytest.raises(DistillError, match="packing: rows and their paraphrase have"):
        pack(both["task"], 64)


def test_a_recipe_reads_paraphrases_if_its_teacher_needs_them(tmp_path, monkeypatch):
    from hf_distill.recipe.load import validate
    from hf_distill.runner.datasets import prepare_data

    Dataset.from_list([paired(i) for i in range(8)]).to_json(tmp_path / "rows.jsonl")
    recipe = validate(
        {
            "teacher": {"model": "org/teacher"},
            "student": {"model": "org/student"},
            "data": {"task": {"path": str(tmp_path / "rows.jsonl")}, "eval": {"holdout": 0.25}, "max_length": 64},
            "train": {"output_dir": "out"},
        }
    )
    assert prepare_data(recipe, byte_tokenizer(), 0, 8).train.column_names == ["input_ids", "labels"]
    monkeypatch.setattr(type(recipe.teacher), "wants_paraphrase", True, raising=False)
    made = prepare_data(recipe, byte_tokenizer(), 0, 8)
    assert "view_labels" in made.train.column_names
    assert "view_labels" in made.held_out.column_names
    Dataset.from_list([{"text": "a" * 99}] * 8).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(DistillError, match=r"data\.task \(.*rows\.jsonl\) has the format text"):
        prepare_data(recipe, byte_tokenizer(), 0, 8)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a"}, r"The source has the format text and the columns \['text'\]; a paraphrase needs the columns"),
        ({"prompt": "a", "completion": "b"}, "The source has the format completion .*Add them"),
        (
            {"prompt": "a", "completion": "b", "paraphrase": None},
            r"row 0 \(counted from 0\), column paraphrase: it must have the type of.*found None for 'a'",
        ),
    ],
)
def test_missing_paraphrases_are_refused(example, message):
    with pytest.raises(DistillError, match=message):
        tokenize_dataset(Dataset.from_list([example]), byte_tokenizer(), 64, second_prompt=PARAPHRASE)


def test_a_batch_with_a_missing_or_different_paraphrase_is_refused():
    batch, view = long_rows(count=2, length=9, prompt=4), BatchView(paraphrase=True)
    with pytest.raises(DistillError, match="the batch has no view_input_ids, view_attention_mask, view_labels, only"):
        apply(view, "llama", batch)
    other = {f"view_{name}": value for name, value in batch.items()}
    other["view_labels"] = other["view_labels"].where(other["view_labels"] == -100, 7)
    with pytest.raises(DistillError, match="has 10 target tokens and its paraphrase 10, which are not the same"):
        apply(view, "llama", batch | other)
    for kind in ("t5", "sequence"):
        batch = collate(rows(kind, 3))
        other = {f"view_{name}": batch[name].flip(0) for name in ("input_ids", "attention_mask")}
        targets, inputs, moved = apply(view, kind, batch | other)
        assert moved is targets
        assert torch.equal(inputs["input_ids"], batch["input_ids"].flip(0))


def test_batches_without_the_inputs_of_a_view_are_refused():
    view, batch = BatchView(token_dropout=0.1), collate(rows("llama", 3))
    targets = Targets.from_batch(batch, True)
    with pytest.raises(DistillError, match=r"A view changes `input_ids`, and the batch has only \['labels'\]"):
        view({"labels": batch["labels"]}, targets, 0, FILL)
    with pytest.raises(DistillError, match=r"of one shape; got \(3, 12\), \(3, 1, 12, 12\) and \(3, 12\)"):
        view(batch | {"attention_mask": torch.ones(3, 1, 12, 12)}, targets, 0, FILL)
    longer = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"labels": torch.ones(3, 5).long()}
    with pytest.raises(DistillError, match="encoder=True"):
        view(longer, Targets.from_batch(longer, False), 0, FILL)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"token_dropuot": 0.1, "span_deletion": 1.0},
            "view has span_deletion 1.0; it .*did you mean 'token_dropout'",
        ),
        (
            {"token_dropout": -0.1, "span_length": 0, "prepend_context_tokens": 1.5, "paraphrase": "maybe"},
            "token_dropout -0.1; it must be greater.*span_length 0; .*than 0; .*prepend_context_tokens 1.5; .*"
            "paraphrase 'maybe'; it must be a valid boolean",
        ),
        ({"token_dropout": True}, "token_dropout True; it must be a number, not true or false"),
        ({}, "view does not change the batch: set token_dropout"),
        ({"span_length": 4}, "view does not change the batch"),
        ("dropout", "view is 'dropout'; it must be a mapping of token_dropout, span_deletion"),
    ],
)
def test_all_problems_of_a_view_are_in_one_error(value, message):
    with pytest.raises(DistillError, match=message):
        BatchView.parse(value)


def test_a_view_is_read_from_a_mapping():
    assert BatchView.parse({"token_dropout": 0.25, "prepend_context_tokens": 8}) == BatchView(
        token_dropout=0.25, prepend_context_tokens=8
    )
    assert BatchView.parse(ALL) is ALL


def test_the_replacement_is_the_first_special_token_that_is_defined(caplog):
    names = ("mask_token_id", "unk_token_id", "pad_token_id", "eos_token_id")
    for i, name in enumerate(names):
        assert replacement_token_id(SimpleNamespace(**dict.fromkeys(names[i:], 10 + i))) == 10 + i, name
    tokenizer = byte_tokenizer()
    with caplog.at_level(logging.WARNING):
        assert replacement_token_id(tokenizer) == tokenizer.pad_token_id
    assert not caplog.records
    assert replacement_token_id(SimpleNamespace(mask_token_id=0)) == 0
    with pytest.raises(DistillError, match="has none of mask_token, unk_token, pad_token, eos_token"):
        replacement_token_id(SimpleNamespace(mask_token_id=None))
