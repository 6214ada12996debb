"""Packed documents give the same losses and gradients as padded documents."""

import pytest
import torch
from test_mix import NAMES, numbers, sources
from tiny import build
from transformers import BloomConfig, BloomForCausalLM

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.data import Collator, check_packed_attention, mix, pack, unpack_row


def naive_documents(rows):
    return sorted((tuple(row["input_ids"]), tuple(row["labels"])) for row in rows)


def test_packed_rows_hold_every_document_undivided_within_max_length():
    rows = numbers(0, 50)
    packed = pack(rows, 20)
    assert len(packed) < 30
    assert max(len(row["input_ids"]) for row in packed) <= 20
    assert naive_documents(d for row in packed for d in unpack_row(row)) == naive_documents(rows)


def test_tokens_of_a_packed_mixture_keep_the_source():
    rows = mix(sources(), {"task": 0.7, "general": 0.3}, seed=0)
    expected = {(tuple(row["input_ids"]), row["source"]) for row in rows}
    text = set()
    for row in pack(rows, 24):
        start = 0
        for length in row["seq_lengths"]:
            (source,) = set(row["source"][start : start + length])
            text.add((tuple(row["input_ids"][start : start + length]), source))
            start += length
    assert text == expected


def test_position_ids_restart_at_documents_and_first_tokens_are_no_targets():
    rows = [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [3, 2], "source": [0, 0, 0, 1, 1]},
        {"input_ids": [6, 7], "labels": [6, 7], "seq_lengths": [2], "source": [1, 1]},
    ]
    batch = Collator(0, NAMES)(rows)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4, 5, 6, 7]],
        "labels": [[-100, 2, 3, -100, 5, -100, 7]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 1]],
        "source": [[0, 0, 0, 1, 1, 1, 1]],
    }


def one_step(folder, rows, size, attention, kind="llama", alpha=0.5, **options):
    """Return the first log and the gradient of one optimizer step over all rows."""
    student, teacher = build(kind, 0).double(), build(kind, 1, layers=3).double()
    for model in (student, teacher):
        model.set_attn_implementation(attention)
    config = DistillConfig(
        str(folder), max_steps=1, per_device_train_batch_size=size, optim="sgd", learning_rate=1.0, max_grad_norm=0.0,
        lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none", alpha=alpha,
        dataloader_pin_memory=False, remove_unused_columns=False, **options,
    )  # fmt: skip
    trainer = DistillTrainer(student, config, teacher=teacher, train_dataset=rows, data_collator=Collator(0, NAMES))
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    trainer.train()
    return trainer.state.log_history[0], {n: before[n] - p.detach() for n, p in student.named_parameters()}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options",
    [{}, {"alpha": 0.0}, {"losses": [{"name": "hidden_mse", "weight": 0.1}]}],
    ids=["logits", "control", "features"],
)
def test_packing_changes_neither_loss_nor_gradient(tmp_path, attention, options):
    rows = mix(sources(20), {"task": 0.5, "general": 0.5}, seed=0)
    packed = pack(rows, 24)
    padded_log, padded = one_step(tmp_path / "padded", rows, len(rows), attention, **options)
    packed_log, flat = one_step(tmp_path / "packed", packed, len(packed), attention, **options)
    names = [name for name in padded_log if "loss" in name]
    assert len(names) > (0 if options.get("alpha") == 0 else 6)
    for name in names:
        assert packed_log[name] == pytest.approx(padded_log[name], rel=1e-6), name
    for name in padded:
        torch.testing.assert_close(
            flat[name], padded[name], rtol=1e-4, atol=1e-6
        )  # eager attention has a float32 softmax


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_that_separate_documents_pass_the_check(kind, attention):
    model = build(kind)
    model.set_attn_implementation(attention)
    model.train()
    check_packed_attention(model, "student")
    assert model.training


def test_a_model_without_position_ids_is_refused():
    config = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    with pytest.raises(DistillError, match=r"in the student \(BloomForCausalLM\) a packed .* takes no position_ids"):
        check_packed_attention(BloomForCausalLM(config), "student")


def test_attention_across_packed_documents_is_refused(monkeypatch):
    """Masks without packed sequences stand for a model that does not support packing."""
    from transformers import masking_utils

    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)
    with pytest.raises(DistillError, match=r"packing: in the teacher \(LlamaForCausalLM\) .* 'sdpa'"):
        check_packed_attention(build("llama"), "teacher")
