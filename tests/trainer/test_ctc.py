"""CTC models of speech: a distribution for each frame, and the transcript of a row as label."""

import copy

import pytest
import torch
import transformers as tf
from tiny import collate, one_step
from torch.nn import functional as F
from transformers import Trainer

from hf_distill import DistillError
from hf_distill.models.blocks import get_layer_stack
from hf_distill.models.model_types import model_type_of
from hf_distill.teachers import EMATeacher, PeerTeacher

VOCAB, LENGTH = 12, 100
SIZES = dict(num_attention_heads=2, intermediate_size=32, conv_dim=(8, 8), conv_kernel=(4, 3), conv_stride=(4, 2))
SIZES |= dict(num_feat_extract_layers=2, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
SIZES |= dict(initializer_range=0.3, layerdrop=0.0, feat_proj_dropout=0.0, final_dropout=0.0, apply_spec_augment=False)
SIZES |= dict(attention_dropout=0.0, activation_dropout=0.0, vocab_size=VOCAB, pad_token_id=3)


def build(seed: int = 0, layers: int = 1, width: int = 16, name: str = "Wav2Vec2", dropout: float = 0.0, **options):
    """A tiny CTC model whose blank is the token 3."""
    tf.set_seed(seed)
    size = dict(hidden_size=width, num_hidden_layers=layers, hidden_dropout=dropout)
    return getattr(tf, f"{name}ForCTC")(getattr(tf, f"{name}Config")(**(SIZES | size | options)))


def data(n: int = 16, seed: int = 1, pad: str = "right") -> list[dict]:
    """Rows of 60 to 100 samples (7 to 12 frames) with transcripts of 0 to 3 tokens."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        size = 60 + 20 * (i % 3)
        side = (LENGTH - size, 0) if pad == "left" else (0, LENGTH - size)
        labels = torch.randint(4, VOCAB, (3,), generator=g)
        labels[3 - i % 4 :] = -100
        sound = F.pad(torch.randn(size, generator=g), side)
        out.append({"input_values": sound, "attention_mask": F.pad(torch.ones(size).long(), side), "labels": labels})
    return out


@pytest.fixture
def make(make_trainer):
    """`make(alpha=0.3)`: a trainer of tiny CTC models."""

    def make(kind="ctc", **options):
        arguments = {"model": build(), "train_dataset": data(), "eval_dataset": data(7, 5)} | options
        if options.get("cls") is not Trainer and "teacher" not in options:
            arguments["teacher"] = build(1, layers=2, width=24)
        return make_trainer("sequence", **arguments)

    return make


def reference(student, teacher, batch, alpha=0.3, temperature=2.0, reduction="sum"):
    """Loop over rows; both losses are means over the frames of all rows."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    z, y = student(**inputs).logits, teacher.eval()(**inputs).logits.detach()
    soft, hard, kl, agrees = [], [], [], []
    for row, (mask, labels) in enumerate(zip(batch["attention_mask"], batch["labels"], strict=True)):
        frames = (int(mask.sum()) // 4 - 3) // 2 + 1
        p, q = z[row, :frames], y[row, :frames]
        for t, values in ((temperature, soft), (1.0, kl)):
            log_p, log_q = (p / t).log_softmax(-1), (q / t).log_softmax(-1)
            values.append(t**2 * (log_q.exp() * (log_q - log_p)).sum(-1))
        agrees.append((p.argmax(-1) == q.argmax(-1)).double())
        labels = labels[labels != -100]
        sizes = torch.tensor([frames]), torch.tensor([len(labels)])
        loss = F.ctc_loss(p.log_softmax(-1)[:, None], labels[None], *sizes, blank=3, reduction="sum")
        share = 1 / frames if reduction == "sum" else 1 / max(len(labels), 1)
        hard.append((loss * share).expand(frames))
    soft, hard, kl, agreement = (torch.cat(values).mean() for values in (soft, hard, kl, agrees))
    losses = {"soft_loss": soft, "hard_loss": hard, "loss": alpha * soft + (1 - alpha) * hard}
    return losses, {"kl": kl, "agreement": agreement}


@pytest.mark.parametrize(
    ("micro", "number", "pad", "reduction"),
    [
        (4, 2, "right", "sum"),
        (1, 8, "right", "sum"),
        (2, 4, "left", "sum"),
        (8, 1, "right", "mean"),
        (2, 4, "right", "mean"),
    ],
)
def test_loss_and_gradient_equal_the_reference_for_any_micro_batches(make, micro, number, pad, reduction):
    student, rows = build(ctc_loss_reduction=reduction), data(8, pad=pad)
    before = copy.deepcopy(student)
    options = dict(alpha=0.3, temperature=2.0, train_sampling_strategy="sequential", train_dataset=rows, model=student)
    log, gradient = one_step(make, "ctc", micro, number, **options)
    losses, _ = reference(before.train(), build(1, layers=2, width=24), collate(rows), reduction=reduction)
    losses["loss"].backward()
    for name, value in losses.items():
        assert log[name] == pytest.approx(value.item(), rel=1e-5), name
    for name, parameter in before.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=5e-6, msg=name)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_hard_loss_is_that_of_the_model_for_rows_of_one_length(make, reduction):
    rows = data(12)[2::3]  # 12 frames
    assert {int(row["attention_mask"].sum()) for row in rows} == {100}
    model = build(ctc_loss_reduction=reduction)
    expected = model.eval()(**collate(rows)).loss.item() / (4 * 12 if reduction == "sum" else 1)
    metrics = make(model=model, eval_dataset=rows, per_device_eval_batch_size=4).evaluate()
    assert metrics["eval_hard_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"teacher": None}, {"alpha": 0.0}], ids=["no teacher", "alpha 0"])
def test_without_distillation_training_is_bit_identical_to_the_trainers(make, options):
    steps = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)
    results = []
    for arguments in ({"cls": Trainer}, options):
        trainer = make(model=build(dropout=0.1), **steps, **arguments)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
        results.append((losses, trainer.evaluate()["eval_loss"], trainer.model.state_dict()))
    assert results[0][:2] == results[1][:2]
    assert all(torch.equal(results[0][2][name], value) for name, value in results[1][2].items())


@pytest.mark.parametrize("teacher", ["frozen", "hubert", "path", "ema", "several"])
def test_the_evaluation_is_over_all_frames_of_the_data_for_any_teacher(make, teacher, tmp_path):
    other = build(1, layers=2, width=24, name="Hubert" if teacher == "hubert" else "Wav2Vec2")
    other.save_pretrained(tmp_path / "teacher")
    argument = {
        "path": lambda: {"teacher": str(tmp_path / "teacher")},
        "ema": lambda: {"teacher": EMATeacher()},
        "several": lambda: {"teacher": None, "teachers": {"one": other, "two": build(1, layers=2, width=24)}},
    }.get(teacher, lambda: {"teacher": other})()
    metrics = make(alpha=0.3, per_device_eval_batch_size=4, **argument).evaluate()
    losses, statistics = reference(build().eval(), build() if teacher == "ema" else other, collate(data(7, 5)))
    if teacher == "several":  # the soft loss of each teacher has a name of its own
        losses.pop("soft_loss")
    for name, value in (losses | statistics).items():
        assert metrics[f"eval_{name}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
    assert "eval_perplexity" not in metrics
    assert "eval_student_ce" not in metrics


def test_hidden_states_of_the_valid_frames_are_compared(make):
    rows, student, teacher = data(6), build(layers=3), build(1, layers=3)
    losses = [{"name": "hidden_mse", "layers": "last:1"}]
    log = make(model=student, teacher=teacher, alpha=0.0, losses=losses, eval_dataset=rows).evaluate()
    inputs = {name: value for name, value in collate(rows).items() if name != "labels"}
    states = [net.eval()(**inputs, output_hidden_states=True).hidden_states[-1] for net in (student, teacher)]
    errors = (states[0] - states[1]).square().mean(-1)
    counts = (inputs["attention_mask"].sum(1) // 4 - 3) // 2 + 1
    expected = torch.cat([errors[row, :count] for row, count in enumerate(counts)]).mean()
    assert log["eval_hidden_mse_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_any_divergence_trains_and_a_training_resumes(make, tmp_path):
    options = dict(max_steps=4, save_steps=2, save_strategy="steps", divergence="js")
    whole = make(folder="whole", **options)
    whole.train()
    resumed = make(folder="resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(value, resumed.model.state_dict()[n]) for n, value in whole.model.state_dict().items())
    whole.create_model_card()
    assert "pipeline_tag: automatic-speech-recognition" in (tmp_path / "whole" / "README.md").read_text()


def test_a_transcript_that_does_not_fit_is_skipped_or_has_no_loss_with_zero_infinity(make, caplog):
    rows = [{**data(1)[0], "labels": torch.full((3,), 5)}]  # repeated tokens need blanks between them
    rows[0]["attention_mask"] = (torch.arange(LENGTH) < 28).long()  # 3 frames
    make(train_dataset=rows, max_steps=1).train()
    assert "hard: not finite" in caplog.text
    metrics = make(model=build(ctc_zero_infinity=True), eval_dataset=rows).evaluate()
    assert metrics["eval_hard_loss"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            lambda: {"teacher": build(1, conv_stride=(4, 1))},
            "One model returns 23 frames for each row and the student 12",
        ),
        (
            lambda: {"teacher": build(1, pad_token_id=0)},
            "blank of the teacher is the token 0 and that of the student 3",
        ),
        (lambda: {"teacher": build(1, vocab_size=14)}, "returns logits of 14 classes and the student of 12"),
        (lambda: {"divergence": "span_kl"}, "span_kl is for spans of positions"),
        (lambda: {"losses": [{"name": "cross_entropy"}]}, "cross_entropy is for a distribution over ids"),
        (lambda: {"label_smoothing_factor": 0.1}, "ctc has no label smoothing"),
        (lambda: {"model": build(ctc_loss_reduction="none")}, "ctc_loss_reduction of the config is 'none'"),
        (
            lambda: {"train_dataset": [r | {"labels": torch.tensor([15, 4, 4])} for r in data(4)]},
            "`labels` has the id 15",
        ),
    ],
)
def test_models_and_arguments_that_do_not_fit_are_refused(make, options, message):
    with pytest.raises(DistillError, match=message):
        make(**options(), max_steps=1).train()


def test_the_frames_are_those_that_the_model_counts():
    model = build()
    frames = model_type_of(model).output_type.countable_labels(collate(data(6)), False)
    mask = model._get_feature_vector_attention_mask(frames.shape[1], collate(data(6))["attention_mask"])
    assert torch.equal(frames == 0, mask)
    assert model(collate(data(6))["input_values"]).logits.shape[1] == frames.shape[1]


def test_a_peer_and_an_adapter_are_trained(make):
    from peft import LoraConfig, get_peft_model

    peer = build(1, layers=2, width=24)
    before = copy.deepcopy(peer)
    make(teacher=PeerTeacher(peer), max_steps=2, learning_rate=0.01).train()
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), peer.parameters(), strict=True))
    adapted = get_peft_model(build(), LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    log = make(model=adapted, max_steps=1, train_sampling_strategy="sequential").evaluate()
    losses, _ = reference(adapted.eval(), build(1, layers=2, width=24), collate(data(7, 5)), alpha=0.5)
    assert log["eval_loss"] == pytest.approx(losses["loss"].item(), rel=1e-5)


def test_blocks_are_found_among_as_many_convolutions(make):
    student, teacher = build(layers=2), build(1, layers=2)  # and two convolutions
    trainer = make(model=student, teacher=teacher, losses=[{"name": "hidden_mse"}], max_steps=1)
    stack = get_layer_stack(student)
    assert stack.blocks is student.wav2vec2.encoder.layers
    trainer.train()


def test_a_loss_on_blocks_that_training_skips_at_random_is_refused(make):
    with pytest.raises(DistillError, match=r"`layerdrop` of its config skips layers.*with layerdrop=0.0"):
        make(model=build(layers=3, layerdrop=0.5), losses=[{"name": "hidden_mse"}])
    make(model=build(layers=3, layerdrop=0.5), max_steps=1).train()  # the loss on logits needs no layers
