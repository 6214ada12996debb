"""Semantic segmentation: a distribution over classes for each pixel of the labels that is not ignored."""

import copy
from pathlib import Path

import pytest
import torch
import transformers as tf
from sklearn.metrics import jaccard_score
from tiny import collate, one_step
from torch import nn
from torch.nn import functional as F
from transformers import Trainer

from hf_distill import DistillError
from hf_distill.teachers import EMATeacher

BEIT = dict(num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=4, out_indices=[1, 2, 3, 4])
BEIT |= dict(initializer_range=0.3, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, drop_path_rate=0.0)
BEIT |= dict(num_hidden_layers=4, pool_scales=[1], use_auxiliary_head=True, auxiliary_channels=8)


def build(seed: int = 0, width: int = 8, strides=(2, 2), batch_norm: bool = False, dropout: float = 0.0, **options):
    """A tiny Segformer; without batch norms, whose statistics are those of a micro-batch."""
    tf.set_seed(seed)
    config = dict(num_labels=3, num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[width, width])
    config |= dict(patch_sizes=[3, 3], strides=list(strides), num_attention_heads=[1, 2], mlp_ratios=[2, 2])
    config |= dict(
        decoder_hidden_size=width, classifier_dropout_prob=dropout, drop_path_rate=0.0, initializer_range=0.3
    )
    model = tf.SegformerForSemanticSegmentation(tf.SegformerConfig(**(config | options)))
    if not batch_norm:
        model.decode_head.batch_norm = nn.Identity()
    return model


def beit(seed: int = 0, width: int = 16):
    """A tiny BEiT, whose loss has a part of an auxiliary head."""
    tf.set_seed(seed)
    model = tf.BeitForSemanticSegmentation(tf.BeitConfig(hidden_size=width, num_labels=3, **BEIT))
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


def data(n: int = 8, seed: int = 1, ignored: int = 255) -> list[dict]:
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        labels = torch.randint(0, 3, (12, 10), generator=g)
        labels[: i % 5] = ignored
        out.append({"pixel_values": torch.randn(3, 16, 16, generator=g), "labels": labels})
    return out


@pytest.fixture
def make(make_trainer):
    """`make(alpha=0.3)`: a trainer of tiny Segformers; the logits of the teacher have another size."""

    def make(kind="segmentation", **options):
        arguments = {"model": build(), "train_dataset": data(), "eval_dataset": data(7, 5)} | options
        if options.get("cls") is not Trainer and "teacher" not in options:
            arguments["teacher"] = build(1, width=12, strides=(4, 1))
        return make_trainer("sequence", **arguments)

    return make


def reference(student, teacher, batch, alpha=0.3, temperature=2.0):
    """The logits of both models, interpolated to the labels; means over the pixels that are not ignored."""
    labels, kept = batch["labels"], batch["labels"] != 255
    z, y = (
        F.interpolate(net(batch["pixel_values"]).logits, size=labels.shape[1:], mode="bilinear").permute(0, 2, 3, 1)[
            kept
        ]
        for net in (student, teacher.eval())
    )
    soft, kl = (
        t**2
        * F.kl_div((z / t).log_softmax(-1), (y / t).detach().log_softmax(-1), log_target=True, reduction="none")
        .sum(-1)
        .mean()
        for t in (temperature, 1.0)
    )
    hard = F.cross_entropy(z, labels[kept])
    losses = {"soft_loss": soft, "hard_loss": hard, "loss": alpha * soft + (1 - alpha) * hard}
    statistics = {"kl": kl, "agreement": (z.argmax(-1) == y.argmax(-1)).double().mean()}
    return losses, statistics


@pytest.mark.parametrize(("micro", "number"), [(4, 2), (1, 8)])
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(make, micro, number):
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential")
    log, gradient = one_step(make, "segmentation", micro, number, **options)
    student = build()
    losses, _ = reference(student.train(), build(1, width=12, strides=(4, 1)), collate(data()))
    losses["loss"].backward()
    for name, value in losses.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-5), name
    for name, parameter in student.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize(("micro", "number"), [(4, 2), (2, 4)])
def test_the_loss_of_an_auxiliary_head_stays_in_the_objective(make, micro, number):
    student = beit()
    before = copy.deepcopy(student).train()
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential", model=student)
    log, gradient = one_step(make, "segmentation", micro, number, teacher=beit(1, 24), **options)
    batch = collate(data())
    losses, _ = reference(before, beit(1, 24), batch)
    aux = before(**batch).loss - losses["hard_loss"]
    (losses["loss"] + aux).backward()
    assert aux > 0.1
    assert log["aux_loss"] == pytest.approx(aux.item(), rel=1e-4)
    for name, parameter in before.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(make, options):
    steps = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = make(model=build(batch_norm=True, dropout=0.1), **steps, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


@pytest.mark.parametrize("teacher", ["frozen", "path", "ema"])
def test_the_evaluation_is_over_all_pixels_and_returns_the_logits_of_the_model(make, teacher, tmp_path):
    student, other = build(batch_norm=True), build(1, width=12, strides=(4, 1), batch_norm=True)
    other.save_pretrained(tmp_path / "teacher")
    argument = {"path": str(tmp_path / "teacher"), "ema": EMATeacher()}.get(teacher, other)
    before, other = copy.deepcopy(student).eval(), copy.deepcopy(student if teacher == "ema" else other)
    shapes = lambda p: {"shapes": [[*p.predictions.shape], [*p.label_ids.shape]]}  # noqa: E731
    options = dict(model=student, teacher=argument, alpha=0.3, per_device_eval_batch_size=4, compute_metrics=shapes)
    trainer = make(**options)
    metrics = trainer.evaluate()
    losses, statistics = reference(before, other, collate(data(7, 5)))
    for name, value in (losses | statistics).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert metrics["eval_shapes"] == [[7, 3, 8, 8], [7, 12, 10]]
    assert "eval_perplexity" not in metrics
    trainer.create_model_card()
    assert "pipeline_tag: image-segmentation" in (tmp_path / "out" / "README.md").read_text()


def test_the_hard_loss_is_that_of_the_model_and_ignores_the_label_of_its_config(make):
    rows = data(4, ignored=7)
    model = build(semantic_loss_ignore_index=7)
    expected = model.eval()(**collate(rows)).loss.item()
    assert make(model=model, eval_dataset=rows).evaluate()["eval_hard_loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"train_dataset": [r | {"labels": torch.tensor(1)} for r in data(4)]}, "integer labels of shape"),
        (lambda: {"train_dataset": data(4, ignored=9)}, "labels are outside the student's 3 classes"),
        (lambda: {"teacher": build(1, num_labels=4)}, "4 classes and the student 3"),
        (lambda: {"model": build(num_labels=1)}, "segments images into one class"),
        (lambda: {"divergence": "bernoulli_kl"}, "bernoulli_kl is for independent labels"),
        (
            lambda: {"teacher": tf.SegformerForImageClassification(build(1).config)},
            "teacher is an image classifier and the student a semantic segmentation model",
        ),
    ],
)
def test_models_and_labels_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(DistillError, match=message):
        make(**options(), max_steps=1).train()


def test_the_mean_iou_of_an_evaluation_equals_that_of_all_pixels(make):
    student, batch = build(), collate(data(7, 5))
    metrics = make(model=student, per_device_eval_batch_size=4).evaluate()
    labels = batch["labels"]
    with torch.no_grad():
        logits = student.eval()(pixel_values=batch["pixel_values"]).logits
    classes = F.interpolate(logits, labels.shape[-2:], mode="bilinear", align_corners=False).argmax(1)
    counts = labels != 255
    expected = jaccard_score(labels[counts], classes[counts], average="macro")
    assert metrics["eval_mean_iou"] == pytest.approx(expected, abs=1e-6)
    assert "eval_f1" not in metrics


def test_the_model_card_has_the_mean_iou_of_both_models(make):
    trainer = make(max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "mean IoU" in card
    assert "type: mean_iou" in card
    for name in ("eval_mean_iou", "eval_teacher_mean_iou"):
        assert f"{metrics[name]:.1%}" in card, name


def test_labels_of_pixels_in_bytes_are_those_in_integers(make):
    losses = []
    for dtype in (torch.long, torch.uint8):
        rows = [row | {"labels": row["labels"].to(dtype)} for row in data(4)]
        trainer = make(train_dataset=rows, eval_dataset=rows, max_steps=1)
        trainer.train()
        losses.append([trainer.state.log_history[0]["loss"], trainer.evaluate()["eval_loss"]])
    assert losses[0] == losses[1]


def test_losses_on_blocks_of_several_widths_are_refused(make):
    with pytest.raises(DistillError, match=r"has no `hidden_size`.*losses on logits"):
        make(losses=[{"name": "hidden_mse"}])
