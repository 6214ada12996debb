"""Loss and gradient do not depend on how the global batch is split, padded or evaluated."""

import math

import pytest
import torch
from tiny import KINDS, build, collate, one_step, rows

from hf_distill.core.targets import target_labels
from hf_distill.teachers import FrozenTeacher


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_accumulation_does_not_change_loss_or_gradient(make_trainer, kind):
    unsplit, gradient = one_step(make_trainer, kind, 8, 1)
    for micro, pieces in ((2, 4), (1, 8)):
        split, pieces_gradient = one_step(make_trainer, kind, micro, pieces)
        for name in ("loss", "soft_loss", "hard_loss"):
            assert split[name] == pytest.approx(unsplit[name], rel=1e-6)
        for name in gradient:
            torch.testing.assert_close(pieces_gradient[name], gradient[name], rtol=1e-4, atol=1e-6)


def test_the_count_and_the_loss_read_the_labels_that_were_shifted_once(make_trainer, monkeypatch):
    shifted, keys = [], []

    def recorded(inputs, shift):
        made = inputs.get("shift_labels") is None
        shifted.append(made)
        return target_labels(inputs, shift)

    class Recorded(FrozenTeacher):
        def forward(self, inputs, targets, feature_requests):
            keys.append({*inputs})
            return super().forward(inputs, targets, feature_requests)

    for module in ("core.targets", "losses.output_types.distributions"):
        monkeypatch.setattr(f"hf_distill.{module}.target_labels", recorded)
    options = dict(max_steps=2, gradient_accumulation_steps=2, self_check=False)
    make_trainer(teacher=Recorded(build("llama", 1)), **options).train()
    assert shifted == 2 * [True, True, False, False]  # two micro-batches are counted, then trained
    assert all(names == {"input_ids", "attention_mask", "labels"} for names in keys)


def test_shifted_labels_of_a_collator_are_the_target_tokens(make_trainer):
    """A collator that masks every other token equals labels that are masked."""

    def masked(examples):
        batch = collate(examples)
        batch["labels"][:, 1::2] = -100
        return batch

    def shifted(examples):
        return collate(examples) | {"shift_labels": target_labels(masked(examples), shift=True)}

    logs = []
    for name, collator in (("masked", masked), ("shifted", shifted)):
        trainer = make_trainer(data_collator=collator, folder=name, max_steps=2, gradient_accumulation_steps=2)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_the_padding_side_does_not_change_loss_or_gradient(make_trainer, kind):
    """Models with absolute positions (GPT-2, BERT) count padding in any training, so they are not tested here."""
    results = [one_step(make_trainer, kind, 4, 2, train_dataset=rows(kind, 8, pad=pad)) for pad in ("left", "right")]
    assert results[0][0]["loss"] == pytest.approx(results[1][0]["loss"], rel=1e-6)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(gradient, results[1][1][name], rtol=1e-4, atol=1e-6)


def test_logged_terms_add_up_to_the_loss(make_trainer):
    trainer = make_trainer(alpha=0.3, temperature=3.0, gradient_accumulation_steps=2, logging_steps=1)
    trainer.train()
    for log in trainer.state.log_history[:4]:
        assert log["loss"] == pytest.approx(0.3 * log["soft_loss"] + 0.7 * log["hard_loss"], rel=1e-6)


def test_the_eval_batch_size_does_not_change_metrics(make_trainer):
    data = rows("llama", 7, seed=5)
    metrics = {}
    for size in (1, 2, 7):
        trainer = make_trainer(per_device_eval_batch_size=size, eval_dataset=data)
        metrics[size] = trainer.evaluate()
    for name in ("eval_loss", "eval_perplexity", "eval_kl", "eval_agreement", "eval_teacher_perplexity"):
        assert metrics[1][name] == pytest.approx(metrics[7][name], rel=1e-6)
        assert metrics[2][name] == pytest.approx(metrics[7][name], rel=1e-6)


def test_batches_without_target_tokens_do_not_change_metrics(make_trainer):
    """All batches and ranks must sum the same metrics, even if a batch has no target token."""
    data = rows("llama", 4, seed=5)
    rows_without_targets = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in data[:2]]
    expected = make_trainer(eval_dataset=data).evaluate()
    trainer = make_trainer(
        per_device_eval_batch_size=2,
        eval_dataset=[*data, *rows_without_targets],
        train_dataset=rows_without_targets * 4,
        max_steps=2,
    )
    got = trainer.evaluate()
    for name in ("eval_loss", "eval_kl", "eval_perplexity", "eval_teacher_entropy"):
        assert got[name] == pytest.approx(expected[name], rel=1e-6)
    trainer.train()
    assert math.isnan(trainer.state.log_history[-2]["loss"])


def test_evaluation_equals_metrics_of_dense_logits(make_trainer):
    trainer = make_trainer(alpha=0.3, temperature=2.0)
    metrics = trainer.evaluate()
    batch = collate(trainer.eval_dataset)
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    is_target = batch["labels"][:, 1:] != -100
    labels = batch["labels"][:, 1:][is_target]
    with torch.no_grad():
        s, t = (m(**inputs).logits[:, :-1][is_target].double() for m in (trainer.model, trainer.teacher.model))
    ce = torch.nn.functional.cross_entropy
    kl = torch.nn.functional.kl_div
    assert metrics["eval_perplexity"] == pytest.approx(ce(s, labels).exp().item(), rel=1e-5)
    assert metrics["eval_teacher_perplexity"] == pytest.approx(ce(t, labels).exp().item(), rel=1e-5)
    assert metrics["eval_agreement"] == pytest.approx((s.argmax(-1) == t.argmax(-1)).double().mean().item())
    t1 = kl(s.log_softmax(-1), t.softmax(-1), reduction="batchmean").item()
    t2 = kl((s / 2).log_softmax(-1), (t / 2).softmax(-1), reduction="batchmean").item()
    assert metrics["eval_kl"] == pytest.approx(t1, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(0.3 * 4 * t2 + 0.7 * ce(s, labels).item(), rel=1e-5)


def test_full_determinism_runs_with_every_kind_of_loss(make_trainer):
    losses = [{"name": name} for name in ("hidden_mse", "hidden_relation", "value_relation")]
    try:
        trainer = make_trainer(full_determinism=True, losses=losses, max_steps=1)
        trainer.train()
        assert trainer.state.global_step == 1
    finally:
        torch.use_deterministic_algorithms(False)
