"""Padding-free training with flash attention: both models get the lengths of the documents in a packed batch."""

from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from test_mix import numbers
from tiny import build
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.cache import write_cache
from hf_distill.data import Collator, pack
from hf_distill.models.model_call import FLASH_ATTENTION_INPUTS, accepted_inputs
from hf_distill.models.output_head import _shorten
from hf_distill.teachers import (
    CachedTeacher,
    EMATeacher,
    FrozenTeacher,
    MTPTeacher,
    MultiTeacher,
    MultiViewTeacher,
    PeerTeacher,
)
from hf_distill.trainer import packed_batches
from hf_distill.trainer.packed_batches import PackedAttentionCheck

VARLEN = "flash_attention_on_the_cpu"
ROWS = [
    {"input_ids": [1, 2, 3, 4, 5], "labels": [1, 2, 3, 4, 5], "seq_lengths": [3, 2]},
    {"input_ids": [6, 7], "labels": [6, 7], "seq_lengths": [2]},
]


def attend_by_document(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Stands for the kernel that reads lengths; [1, heads, S, d] -> [1, S, heads, d], inside each document."""
    assert attention_mask is None
    assert set(FLASH_ATTENTION_INPUTS) <= kwargs.keys(), "without the lengths, every layer would derive them"
    bounds = kwargs["cu_seq_lens_q"]
    assert bounds.dtype == torch.int32
    assert isinstance(kwargs["max_length_q"], int)
    assert kwargs["max_length_q"] == bounds.diff().max()
    parts = [
        scaled_dot_product_attention(
            query[:, :, i:j], key[:, :, i:j], value[:, :, i:j], is_causal=True, scale=scaling, enable_gqa=True
        )
        for i, j in pairwise(bounds.tolist())
    ]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


@pytest.fixture
def varlen(monkeypatch):
    """Return the name of an attention that a model can be set to on a CPU."""
    monkeypatch.setitem(AttentionInterface._global_mapping, VARLEN, attend_by_document)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, VARLEN, flash_attention_mask)
    return VARLEN


def naive_lengths(rows):
    """Return the four inputs of flash attention, from the lengths of the documents."""
    lengths = [length for row in rows for length in row["seq_lengths"]]
    sums = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    return {"cu_seq_lens_q": sums, "cu_seq_lens_k": sums, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def set_attention(model, attention):
    model.config._attn_implementation = attention  # `set_attn_implementation` looks for the package flash_attn
    return model


def make_trainer(folder, rows, student, teacher, **options):
    collator = options.pop("data_collator", Collator(0))
    config = DistillConfig(
        str(folder), **{
            "max_steps": 1, "per_device_train_batch_size": len(rows) if isinstance(rows, Dataset) else 2,
            "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "lr_scheduler_type": "constant",
            "logging_steps": 1, "save_strategy": "no", "report_to": "none", "dataloader_pin_memory": False,
            "remove_unused_columns": False, "per_device_eval_batch_size": 4,
        } | options,
    )  # fmt: skip
    return DistillTrainer(student, config, teacher=teacher, train_dataset=rows, data_collator=collator)


def record_inputs(model):
    """Return a list to which each full forward of a model adds its inputs."""
    calls = []
    model.register_forward_pre_hook(lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True)
    return calls


def test_packed_batches_have_the_lengths_of_their_documents():
    batch, expected = Collator(0, return_flash_attn_kwargs=True)(ROWS), naive_lengths(ROWS)
    assert batch.keys() == Collator(0)(ROWS).keys() | expected.keys()
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert batch[name].tolist() == expected[name].tolist() == [0, 3, 5, 7]
        assert batch[name].dtype == torch.int32
    for name in ("max_length_q", "max_length_k"):
        assert type(batch[name]) is int
        assert batch[name] == expected[name] == 3
    unpacked = [{"input_ids": [1, 2], "labels": [1, 2]}] * 2
    assert Collator(0, return_flash_attn_kwargs=True)(unpacked).keys() == {"input_ids", "labels"}


@pytest.mark.parametrize("flash", ["student", "teacher", "both", "neither"])
def test_the_trainer_turns_the_lengths_on_where_a_model_has_flash_attention(tmp_path, flash, varlen):
    student, teacher = build("llama", 0), build("llama", 1)
    for name, model in (("student", student), ("teacher", teacher)):
        set_attention(model, varlen if flash in (name, "both") else "sdpa")
    given = Collator(0, ("a", "b"))
    trainer = make_trainer(tmp_path, pack(numbers(0, 8), 24), student, teacher, data_collator=given)
    assert trainer.data_collator.return_flash_attn_kwargs == (flash != "neither")
    assert (trainer.data_collator.pad_token_id, trainer.data_collator.sources) == (0, ("a", "b"))
    assert not given.return_flash_attn_kwargs


TEACHERS = {
    "frozen": lambda model, _: model,
    "multi": lambda model, other: MultiTeacher({"one": FrozenTeacher(model), "two": FrozenTeacher(other)}),
    "ema": lambda *_: EMATeacher(),
    "multi_view": lambda *_: MultiViewTeacher({"token_dropout": 0.2}),
    "peer": lambda model, _: PeerTeacher(model, mutual=True),
    "mtp": lambda *_: MTPTeacher(num_future_tokens=1),
}


@pytest.mark.parametrize("kind", TEACHERS)
@pytest.mark.parametrize("model", ["llama", "gpt2"])  # gpt2 has `**kwargs` without a type
def test_student_and_teacher_receive_the_lengths_and_the_loss_is_that_of_sdpa(
    tmp_path, kind, model, varlen, smollm2_tokenizer
):
    rows, logs, gradients = pack(numbers(0, 12), 24), [], []
    for attention in ("sdpa", varlen):
        models = [set_attention(build(model, seed).double(), attention) for seed in range(3)]
        calls = [record_inputs(each) for each in models]
        teacher = TEACHERS[kind](*models[1:])
        if kind == "multi_view":
            teacher._tokenizer = smollm2_tokenizer
        options = {"alpha": 0.0} if kind == "mtp" else {}
        trainer = make_trainer(tmp_path, rows, models[0], teacher, chunk_tokens=16, data_seed=0, **options)
        trainer.train()
        logs.append({name: value for name, value in trainer.state.log_history[0].items() if "loss" in name})
        gradients.append([p.detach() for p in models[0].parameters()])
    expected = naive_lengths(rows)
    for recorded in calls[: {"frozen": 2, "peer": 2, "multi": 3}.get(kind, 1)]:
        full = [call for call in recorded if call["input_ids"].shape[1] == sum(map(sum, rows["seq_lengths"]))]
        assert full
        for call in full:
            assert set(FLASH_ATTENTION_INPUTS) <= call.keys()
            assert call["max_length_q"] == expected["max_length_q"]
            lengths = call["cu_seq_lens_q"].diff()
            assert sorted(lengths.tolist()) == sorted(expected["cu_seq_lens_q"].diff().tolist())
            assert torch.equal(call["cu_seq_lens_q"][:-1].long(), (call["position_ids"][0] == 0).nonzero()[:, 0])
    assert logs[1] == pytest.approx(logs[0], rel=1e-6)
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_lengths_change_nothing_for_other_attention(tmp_path, attention):
    rows, results = pack(numbers(0, 12), 24), []
    for collator in (Collator(0), Collator(0, return_flash_attn_kwargs=True)):
        student, teacher = (set_attention(build("llama", seed), attention) for seed in (0, 1))
        trainer = make_trainer(tmp_path, rows, student, teacher, data_collator=collator)
        trainer.train()
        evaluated = trainer.evaluate(rows)
        results.append((trainer.state.log_history[0]["loss"], evaluated["eval_loss"], evaluated["eval_kl"]))
    assert results[0] == results[1]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_accepts_the_lengths_if_its_forward_passes_them_on(kind):
    batch = Collator(0, return_flash_attn_kwargs=True)(ROWS)
    assert set(FLASH_ATTENTION_INPUTS) <= accepted_inputs(build(kind), batch).keys()

    class WithoutMore(type(build(kind))):
        def forward(self, input_ids, position_ids=None):
            return super().forward(input_ids, position_ids=position_ids)

    assert not set(FLASH_ATTENTION_INPUTS) & accepted_inputs(WithoutMore(build(kind).config), batch).keys()


def test_a_shortened_batch_has_no_lengths_of_the_full_row():
    """The measurement of the output head runs on the first positions; it would read beyond them."""
    batch = Collator(0, return_flash_attn_kwargs=True)([{**ROWS[0], **{
        "input_ids": [5] * 100, "labels": [5] * 100, "seq_lengths": [60, 40]}}])  # fmt: skip
    del batch["labels"]
    short = _shorten(batch)
    assert short is not None
    assert {name: tuple(value.shape) for name, value in short.items()} == {
        "input_ids": (1, 64),
        "position_ids": (1, 64),
    }


def test_lengths_that_accelerate_would_slice_by_rows_are_refused_or_left_out(tmp_path, varlen):
    stream = pack(numbers(0, 12), 24).to_iterable_dataset()
    given = Collator(0, return_flash_attn_kwargs=True)
    with pytest.raises(DistillError, match=r"train_dataset .*cu_seq_lens_q.*dispatch_batches': False"):
        make_trainer(tmp_path, stream, build("llama"), build("llama", 1), data_collator=given)
    undispatched = {"accelerator_config": {"dispatch_batches": False}}
    make_trainer(tmp_path, stream, build("llama"), build("llama", 1), data_collator=given, **undispatched).train()
    for options, expected in (({}, False), (undispatched, True)):
        student = set_attention(build("llama"), varlen)
        trainer = make_trainer(tmp_path, stream, student, build("llama", 1), **options)
        assert trainer.data_collator.return_flash_attn_kwargs == expected


@pytest.mark.parametrize("kind", ["hidden", "top_k"])
def test_a_cache_of_packed_batches_with_lengths_is_that_without(tmp_path, kind, varlen):
    rows = pack(numbers(0, 12), 24)
    for folder, attention, collator in (
        ("sdpa", "sdpa", Collator(0)),
        ("varlen", varlen, Collator(0, return_flash_attn_kwargs=True)),
    ):
        model = set_attention(build("llama", 1), attention)
        write_cache(str(tmp_path / folder), model, rows, rows, kind=kind, collator=collator, batch_size=4)
    results = []
    for folder in ("sdpa", "varlen"):
        teacher = CachedTeacher(str(tmp_path / folder))
        trainer = make_trainer(tmp_path / "out", rows, build("llama"), teacher, divergence="forward_kl")
        trainer.train()
        results.append(trainer.state.log_history[0]["soft_loss"])
    assert results[1] == pytest.approx(results[0], rel=1e-4)


def test_a_problem_of_another_rank_is_an_error_on_this_one(tmp_path, monkeypatch):
    """A rank that went on would wait for the others until its timeout."""
    trainer = make_trainer(tmp_path, pack(numbers(0, 8), 24), build("llama"), build("llama", 1))
    flags = []
    monkeypatch.setattr(packed_batches, "any_process", lambda flag, device: flags.append(flag) or len(flags) == 2)
    trainer.add_callback(PackedAttentionCheck(trainer))
    with pytest.raises(DistillError, match="on another rank, documents attend to each other in the teacher"):
        trainer.train()
    assert flags == [False, False]
