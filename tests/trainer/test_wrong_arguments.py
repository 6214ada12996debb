"""Arguments of a wrong type or value raise a DistillError that names them before training starts."""

import pytest
import torch
from tiny import build, collate, rows
from transformers import TrainingArguments

from hf_distill import DistillConfig, DistillError, DistillSeq2SeqConfig, DistillSeq2SeqTrainer, DistillTrainer
from hf_distill.teachers import EMATeacher

WRONG = [None, "a", "", "[", 1.5, float("nan"), [], [1], {"a": 1}, object()]


def config(tmp_path, **options):
    return DistillConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=1, **options)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("chunk_tokens", [*WRONG[1:], 0, -1, True]),
        ("max_consecutive_nonfinite_steps", [*WRONG, 0, -1, True]),
        ("stop_on_signal", [*WRONG, 1]),
        ("self_check", [*WRONG, 1]),
        ("teacher_fsdp", [*WRONG, 1]),
        ("compile_teacher", [*WRONG, 1]),
        ("teacher_deepspeed", [1.5, 5, True, [], [1], object(), "{"]),
        ("divergence", ["a", "", 1.5, 5, True, [], [1], {}, {"a": 1}, object(), "{"]),
        ("losses", ["hidden_mse", "", "[", "{}", 1.5, True, {}, [1], object()]),
        ("projectors", ["a", "", "{", 1.5, True, [], [1], {"a": 1}, object()]),
        ("teacher_init_kwargs", ["a", "", "[", "[]", 1.5, True, [], [1], object()]),
        ("temperature", [*WRONG[1:4], float("nan"), [1], -1, True]),
        ("alpha", [*WRONG, -1, True]),
        ("learning_rate", ["a", float("nan")]),
        ("weight_decay", [float("nan")]),
        ("num_train_epochs", [float("nan"), "three"]),
        ("label_smoothing_factor", [-0.1, 1.5]),
        ("torch_compile_backend", ["inducto", 5]),
    ],
)
def test_an_error_names_the_field_of_a_wrong_type(tmp_path, name, values):
    for value in values:
        with pytest.raises(DistillError) as error:
            config(tmp_path, **{name: value})
        assert name in str(error.value) or "loss" in str(error.value), (value, str(error.value))


def test_an_error_names_all_wrong_fields(tmp_path):
    with pytest.raises(
        DistillError, match=r"chunk_tokens is 'a'.*max_consecutive_nonfinite_steps is 0.*learning_rate is nan"
    ):
        config(tmp_path, chunk_tokens="a", max_consecutive_nonfinite_steps=0, learning_rate=float("nan"))


def test_the_smoothing_of_plain_training_arguments_is_checked_when_the_trainer_is_created(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], label_smoothing_factor=-0.1)
    with pytest.raises(DistillError, match=r"label_smoothing_factor is -0.1; it must be a number in \[0, 1\]"):
        trainer(tmp_path, args=args)


def trainer(tmp_path, model=None, teacher=None, **options):
    model = model or (None if "model_init" in options else build("llama", 0))
    teacher = teacher or build("llama", 1)
    options = {"args": config(tmp_path), "train_dataset": rows("llama", 4), "data_collator": collate} | options
    return DistillTrainer(model, teacher=teacher, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "org/student"}, r"model is the id or path 'org/student'.* Load it.*from_pretrained"),
        ({"model": "./nowhere"}, r"model is the id or path './nowhere'.* Load it"),
        ({"model": 5}, "model has the type int. Pass the student"),
        ({"model": {"a": 1}}, "model has the type dict. Pass the student"),
        ({"args": {"output_dir": "x"}}, "args has the type dict. Pass a DistillConfig"),
        ({"args": "out"}, "args has the type str. Pass a DistillConfig"),
        ({"teacher": 5}, "The teacher is of the type int"),
        ({"teacher": EMATeacher}, r"The teacher is the class EMATeacher: .*an instance, such as EMATeacher\("),
        (
            {"model": None, "model_init": lambda: build("llama"), "teacher": EMATeacher()},
            "but EMATeacher works with one student",
        ),
        (
            {"teacher": {"big": 5, "small": "./nowhere"}},
            r"\['big'\]: .* int:.*teachers\['small'\]: .*nowhere",
        ),
    ],
)
def test_an_error_names_the_trainer_argument_of_a_wrong_type(tmp_path, options, message):
    with pytest.raises(DistillError, match=message):
        trainer(tmp_path, **options)


def test_a_missing_path_as_student_of_the_trl_trainer_raises_an_error(tmp_path):
    from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

    args = DistillSFTConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(DistillError, match=r"The student \./nowhere is a path, and there is no such folder"):
        DistillSFTTrainer("./nowhere", args, teacher=build("llama", 1), train_dataset=rows("llama", 4))


@pytest.mark.parametrize(("shift", "named"), [(1000, "10"), (-1000, "-")])
def test_token_ids_outside_the_students_vocabulary_are_reported(tmp_path, shift, named):
    data = [row | {"input_ids": row["input_ids"] + shift} for row in rows("llama", 4)]
    with pytest.raises(DistillError, match=rf"input_ids has the token id {named}\d+, and the student.* 97 rows"):
        trainer(tmp_path, train_dataset=data).train()


def test_a_model_that_was_a_teacher_before_can_be_evaluated_and_says_that_it_is_frozen(tmp_path):
    model = build("llama", 3)
    trainer(tmp_path, teacher=model)
    second = trainer(tmp_path, model=model, eval_dataset=rows("llama", 4))
    assert second.evaluate()["eval_loss"] > 0
    with pytest.raises(DistillError, match=r"no parameter of the student requires a gradient.*requires_grad_\(True\)"):
        second.train()
    model.requires_grad_(True)
    second.train()


class OwnLoss(DistillTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


class AddedLoss(DistillTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (loss[0] + 1, loss[1]) if return_outputs else loss + 1


def test_a_subclass_whose_loss_ignores_the_teacher_is_refused(tmp_path):
    options = {"args": config(tmp_path), "train_dataset": rows("llama", 4), "data_collator": collate}
    with pytest.raises(
        DistillError, match=r"compute_loss of OwnLoss does not call super\(\).compute_loss.*@hf_distill"
    ):
        OwnLoss(build("llama", 0), teacher=build("llama", 1), **options).train()
    OwnLoss(build("llama", 0), **options).train()  # without a teacher it is a Trainer
    AddedLoss(build("llama", 0), teacher=build("llama", 1), **options).train()


def test_an_encoder_is_not_shared_by_a_trainer_that_ignores_the_option(tmp_path):
    args = DistillSeq2SeqConfig(str(tmp_path), share_encoder=True)
    with pytest.raises(DistillError, match="share_encoder=True is an option of DistillSeq2SeqTrainer, and DistillTrai"):
        trainer(tmp_path, args=args)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor is 0.1, .* a Linear has none"),
        ({"gradient_checkpointing": True}, "a Linear has no gradient_checkpointing_enable"),
        ({"predict_with_generate": True}, "a Linear does not generate"),
    ],
)
def test_arguments_that_need_a_transformers_model_are_refused_for_a_module(tmp_path, fields, message):
    args = DistillSeq2SeqConfig(str(tmp_path), use_cpu=True, report_to=[], **fields)
    with pytest.raises(DistillError, match=message):
        DistillSeq2SeqTrainer(torch.nn.Linear(2, 2), args)


def test_a_static_graph_of_ddp_is_refused_on_several_processes(make_trainer, monkeypatch):
    """DDP would leave the gradients of each process as they are."""
    make_trainer(ddp_static_graph=True, use_cpu=True)
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda self: 2))
    with pytest.raises(DistillError, match="ddp_static_graph=True"):
        make_trainer(ddp_static_graph=True, use_cpu=True)
