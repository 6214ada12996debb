"""`share_encoder`: a frozen encoder that equals the teacher's runs once, with the same loss and gradients."""

import pytest
import torch
from tiny import speech_rows, whisper

from hf_distill import DistillError, DistillSeq2SeqConfig, DistillSeq2SeqTrainer, cut_student
from hf_distill.teachers import EMATeacher


@pytest.fixture
def make(tmp_path):
    def make(student, teacher, freeze=True, **options):
        if freeze:
            student.freeze_encoder()
        fields = dict(max_steps=3, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1)
        fields |= (
            dict(save_strategy="no", learning_rate=1e-2, dataloader_pin_memory=False, share_encoder=True) | options
        )
        data = speech_rows()
        args = DistillSeq2SeqConfig(str(tmp_path / "out"), **fields)
        return DistillSeq2SeqTrainer(student, args, train_dataset=data, eval_dataset=data[:5], teacher=teacher)

    return make


def pair():
    teacher = whisper(1, encoder_layers=3, decoder_layers=3)
    return cut_student(teacher, decoder_layers=[0, 2]), teacher


def calls_of_encoder_blocks(model) -> list[int]:
    calls = []
    model.get_encoder().layers[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


def test_training_is_that_of_two_encoders_and_the_students_encoder_does_not_run(make):
    logs, weights, numbers = [], [], []
    for share in (False, True):
        student, teacher = pair()
        trainer = make(student, teacher, share_encoder=share, predict_with_generate=True, generation_max_length=8)
        trainer.evaluate()  # the first batch also runs the short forwards that find the output head
        calls = calls_of_encoder_blocks(student), calls_of_encoder_blocks(teacher)
        trainer.train()
        numbers.append(tuple(map(len, calls)))
        logs.append(
            [{k: v for k, v in log.items() if "loss" in k or k == "grad_norm"} for log in trainer.state.log_history]
        )
        logs[-1].append({k: v for k, v in trainer.evaluate().items() if "time" not in k and "per_second" not in k})
        weights.append(student.state_dict())
    assert logs[0] == logs[1]
    assert numbers[1] == (numbers[0][0] - 6, numbers[0][1]), "three steps of two micro-batches each"
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_generation_uses_the_students_encoder(make):
    student, teacher = pair()
    trainer = make(student, teacher, predict_with_generate=True, generation_max_length=8)
    calls = calls_of_encoder_blocks(student)
    trainer.predict(speech_rows()[:5])
    assert calls


def changed(student):
    with torch.no_grad():
        student.get_encoder().conv1.bias += 1
    return student


@pytest.mark.parametrize(
    ("student", "teacher", "options", "message"),
    [
        (lambda s: s, lambda t: t, {"freeze": False}, "freeze_encoder"),
        (changed, lambda t: t, {}, "the values of conv1.bias differ"),
        (lambda s: s, lambda t: t.to(torch.bfloat16), {}, "bfloat16"),
        (lambda s: s, lambda t: EMATeacher(), {}, "EMATeacher"),
        (
            lambda s: s,
            lambda t: t,
            {"losses": [{"name": "hidden_mse", "weight": 1.0, "stack": "encoder"}]},
            "stack: encoder",
        ),
    ],
)
def test_encoders_that_cannot_be_shared_are_refused(make, student, teacher, options, message):
    first, second = pair()
    with pytest.raises(DistillError, match=message):
        make(student(first), teacher(second), **options)
