"""Whisper students: losses against a plain reference, features of encoder and decoder, a frozen encoder, generation."""

import copy

import pytest
import torch
from tiny import SPEECH_LENGTH, collate, speech_rows, whisper
from torch.nn import functional as F
from transformers import WhisperForConditionalGeneration

from hf_distill import (
    DistillConfig,
    DistillError,
    DistillSeq2SeqConfig,
    DistillSeq2SeqTrainer,
    DistillTrainer,
    cut_student,
)
from hf_distill.models.model_types import model_type_of
from hf_distill.models.type_catalog import SPEECH_SEQ2SEQ


@pytest.fixture
def make(tmp_path):
    def make(cls, model, teacher, **options):
        config = DistillSeq2SeqConfig if cls is DistillSeq2SeqTrainer else DistillConfig
        fields = dict(max_steps=1, per_device_train_batch_size=4, optim="sgd", learning_rate=1.0, max_grad_norm=0.0)
        fields |= dict(lr_scheduler_type="constant", save_strategy="no", logging_steps=1, dataloader_pin_memory=False)
        args = config(str(tmp_path / "out"), **fields | options)
        data = speech_rows()
        return cls(model, args, collate, data, data[:5], teacher=teacher)

    return make


def teacher():
    return whisper(1, width=24, encoder_layers=4, decoder_layers=3)


def reference(student, teacher, batch, alpha=0.5, temperature=2.0):
    """The loss of a batch in ten lines."""
    is_target = batch["labels"] != -100
    with torch.no_grad():
        teacher_logits = teacher.eval()(**batch).logits[is_target] / temperature
    logits = student(**batch).logits[is_target]
    soft = F.kl_div(
        F.log_softmax(logits / temperature, -1), F.log_softmax(teacher_logits, -1), log_target=True, reduction="none"
    )
    hard = F.cross_entropy(logits, batch["labels"][is_target])
    return alpha * temperature**2 * soft.sum(-1).mean() + (1 - alpha) * hard


@pytest.mark.parametrize("cls", [DistillTrainer, DistillSeq2SeqTrainer])
def test_loss_and_gradient_equal_a_plain_reference_over_any_split_into_micro_batches(make, cls):
    assert model_type_of(whisper()) is SPEECH_SEQ2SEQ
    for micro, pieces in ((4, 1), (2, 2)):
        student = whisper()
        before = copy.deepcopy(student)
        trainer = make(cls, student, teacher(), per_device_train_batch_size=micro, gradient_accumulation_steps=pieces)
        seen = []
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda model, inputs, *args, **kw: (
            seen.append({k: inputs[k] for k in ("input_features", "labels")}),  # noqa: B023
            compute_loss(model, inputs, *args, **kw),  # noqa: B023
        )[1]
        trainer.train()
        batch = {name: torch.cat([one[name] for one in seen]) for name in seen[0]}
        loss = reference(before.train(), teacher(), batch)
        loss.backward()
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        for (name, old), new in zip(before.named_parameters(), student.parameters(), strict=True):
            if old.grad is not None:
                torch.testing.assert_close(old.detach() - new.detach(), old.grad, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_hidden_states_of_encoder_and_decoder_are_compared(make, stack):
    width = 16
    student, other = whisper(width=width), whisper(1, width=width, encoder_layers=4, decoder_layers=3)
    loss = {"name": "hidden_mse", "weight": 1.0, "stack": stack, "layers": [[1, 3 if stack == "encoder" else 2]]}
    metrics = make(DistillSeq2SeqTrainer, student, other, losses=[loss], per_device_eval_batch_size=5).evaluate()
    batch = collate(speech_rows()[:5])
    outputs = []
    for model in (student, other):
        blocks = (model.get_encoder() if stack == "encoder" else model.get_decoder()).layers
        found = []
        handle = blocks[-1].register_forward_hook(
            lambda m, a, o, to=found: to.append(o[0] if isinstance(o, tuple) else o)
        )
        with torch.no_grad():
            model.eval()(**batch)
        handle.remove()
        outputs.append(found[0])
    per_position = (outputs[0] - outputs[1]).square().mean(-1)
    is_target = batch["labels"] != -100
    if stack == "decoder":
        expected = per_position[is_target].mean()
    else:  # the mean over all positions of a row, weighted by its number of target tokens
        counts = is_target.sum(1)
        expected = (per_position.mean(1) * counts).sum() / counts.sum()
    assert metrics["eval_hidden_mse_loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_encoder_gets_no_gradient_and_training_is_that_of_the_decoder(make):
    student, before = whisper(), whisper()
    student.freeze_encoder()
    losses = [{"name": "hidden_mse", "weight": 1.0, "stack": stack} for stack in ("encoder", "decoder")]
    trainer = make(DistillSeq2SeqTrainer, student, teacher(), losses=losses, learning_rate=0.01, max_steps=2)
    trainer.train()
    for name, parameter in student.named_parameters():
        is_encoder = name.startswith("model.encoder")
        if is_encoder:
            assert parameter.grad is None, name
            assert torch.equal(parameter, before.get_parameter(name)), name
    changed = [name for name, old in before.named_parameters() if not torch.equal(old, student.get_parameter(name))]
    assert any(name.startswith("model.decoder.layers.0") for name in changed)


def test_a_student_with_some_decoder_layers_of_its_teacher_generates_and_is_evaluated(make, tmp_path):
    whole = teacher()
    student = cut_student(whole, decoder_layers=[0, 2])
    student.freeze_encoder()
    trainer = make(
        DistillSeq2SeqTrainer,
        student,
        whole,
        learning_rate=0.01,
        predict_with_generate=True,
        generation_max_length=SPEECH_LENGTH,
    )
    trainer.train()
    output = trainer.predict(speech_rows()[:5])
    with torch.no_grad():
        expected = student.eval().generate(collate(speech_rows()[:5])["input_features"], max_length=SPEECH_LENGTH)
    assert (output.predictions[:, : expected.shape[1]] == expected.numpy()).all()
    assert {"test_kl", "test_perplexity"} <= output.metrics.keys()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert (loaded.config.encoder_layers, loaded.config.decoder_layers) == (4, 2)


def test_a_teacher_by_path_is_loaded_with_the_speech_class(make, tmp_path):
    teacher().save_pretrained(tmp_path / "teacher")
    by_path = make(DistillTrainer, whisper(), str(tmp_path / "teacher")).evaluate()
    by_model = make(DistillTrainer, whisper(), teacher()).evaluate()
    assert by_path["eval_kl"] == by_model["eval_kl"]
    trainer = make(DistillTrainer, whisper(), teacher())
    trainer.create_model_card()
    assert "automatic-speech-recognition" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_loss_on_blocks_of_a_stack_with_layerdrop_is_refused(make, stack):
    student = whisper(0)
    (student.get_encoder() if stack == "encoder" else student.get_decoder()).layerdrop = 0.5  # as its config sets it
    with pytest.raises(DistillError, match=f"`{stack}_layerdrop` of its config skips layers"):
        make(DistillTrainer, student, teacher(), losses=[{"name": "hidden_mse", "stack": stack}])
