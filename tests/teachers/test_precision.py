"""In which precision teachers run when the student trains in mixed precision."""

import pytest
import torch
from tiny import build, collate, rows
from transformers import TrainerCallback

from hf_distill import FrozenTeacher
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.objective import objective
from hf_distill.teachers import AdapterBaseTeacher, EMATeacher, MultiTeacher, RoutedTeacher, Teacher
from hf_distill.trainer.distiller import Distiller


def recorded(module):
    """A list to which each forward of a module adds (is autocast enabled?, dtype of its output)."""
    calls = []

    def record(_module, _args, output):
        output = output[0] if isinstance(output, tuple) else output
        calls.append((torch.is_autocast_enabled("cpu"), output.dtype))

    module.register_forward_hook(record)
    return calls


@pytest.fixture
def head_dtypes(monkeypatch):
    """The dtypes of (hidden states, weight) of the teacher in each fused loss."""
    seen, run_chunks = [], ChunkedLoss.run_chunks

    def run(self, student_logits, *args):
        teacher = self.teacher_logits
        for each in getattr(teacher, "by_teacher", {None: teacher}).values():
            seen.append((each.hidden.dtype, each.weight.dtype))
        return run_chunks(self, student_logits, *args)

    monkeypatch.setattr(ChunkedLoss, "run_chunks", run)
    return seen


def large(dtype=torch.float32):
    return build("llama", 1, layers=3, width=48, vocab=101).to(dtype)


BF16 = (torch.bfloat16, torch.bfloat16)


@pytest.mark.parametrize("losses", [None, [{"name": "hidden_relation", "weight": 0.1}]])
def test_a_float32_teacher_runs_under_the_autocast_of_the_student(make_trainer, head_dtypes, losses):
    teacher = large()
    trainer = make_trainer(teacher=teacher, bf16=True, use_cpu=True, losses=losses, max_steps=2)
    calls = recorded(teacher.model.layers[0].mlp.up_proj)
    trainer.train()
    trainer.evaluate()
    assert set(calls) == {(True, torch.bfloat16)}
    assert set(head_dtypes) == {BF16}
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_in_half_precision_runs_in_its_own_dtype(make_trainer, head_dtypes, dtype):
    teacher = large(dtype)
    trainer = make_trainer(teacher=teacher, bf16=True, use_cpu=True, max_steps=1)
    calls = recorded(teacher.model.layers[0].mlp.up_proj)
    trainer.train()
    assert set(calls) == {(False, dtype)}
    assert set(head_dtypes) == {(dtype, dtype)}


def test_without_mixed_precision_a_float32_teacher_runs_in_float32(make_trainer, head_dtypes):
    teacher = large()
    trainer = make_trainer(teacher=teacher, use_cpu=True, max_steps=1)
    calls = recorded(teacher.model.layers[0].mlp.up_proj)
    trainer.train()
    assert set(calls) == {(False, torch.float32)}
    assert set(head_dtypes) == {(torch.float32, torch.float32)}


def test_several_teachers_run_in_the_precision_of_their_weights(make_trainer, head_dtypes):
    teachers = {"a": large(), "b": large(torch.float16)}
    calls = {name: recorded(t.model.layers[0].mlp.up_proj) for name, t in teachers.items()}
    make_trainer(teacher=MultiTeacher(teachers), bf16=True, use_cpu=True, max_steps=1).train()
    assert set(calls["a"]) == {(True, torch.bfloat16)}
    assert set(calls["b"]) == {(False, torch.float16)}
    assert set(head_dtypes) == {BF16, (torch.float16, torch.float16)}


def test_the_head_of_a_frozen_teacher_is_cast_once(make_trainer, monkeypatch):
    weights, run_chunks = [], ChunkedLoss.run_chunks
    monkeypatch.setattr(
        ChunkedLoss, "run_chunks", lambda self, *a: weights.append(self.teacher_logits.weight) or run_chunks(self, *a)
    )
    teacher = large()
    trainer = make_trainer(teacher=teacher, bf16=True, use_cpu=True, max_steps=4)
    trainer.train()
    assert len({weight.data_ptr() for weight in weights}) == 1
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2)  # a weight that changes nevertheless is cast again
    trainer.evaluate()
    assert torch.equal(weights[-1], 2 * weights[0])


@pytest.mark.parametrize("routed", [False, True])
def test_a_teacher_that_a_callback_changes_through_data_trains_as_one_changed_in_place(make_trainer, routed):
    class Average(TrainerCallback):
        def __init__(self, teacher, in_place):
            self.teacher, self.in_place = teacher, in_place

        @torch.no_grad()
        def on_step_end(self, args, state, control, model=None, **kwargs):
            for p, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
                (p if self.in_place else p.data).lerp_(new.data, 0.5)

    def losses(in_place):
        model, data = (
            build("llama", 1),
            [row | {"teacher": "a"} for row in rows("llama", 32)] if routed else rows("llama", 32),
        )
        teacher = RoutedTeacher({"a": model, "b": build("llama", 2)}) if routed else model
        options = {"teacher": teacher, "callbacks": [Average(model, in_place)], "train_dataset": data}
        trainer = make_trainer(bf16=True, use_cpu=True, eval_dataset=None, **options, remove_unused_columns=False)
        trainer.train()
        return [log["loss"] for log in trainer.state.log_history[:4]]

    assert losses(in_place=False) == losses(in_place=True)


def test_a_quantized_teacher_computes_in_the_dtype_that_it_was_loaded_with(make_trainer, tmp_path):
    large().save_pretrained(tmp_path / "teacher")
    options = {"quantization": "nf4", "dtype": "float32"}
    trainer = make_trainer(
        teacher=str(tmp_path / "teacher"), teacher_init_kwargs=options, bf16=True, use_cpu=True, max_steps=1
    )
    calls = recorded(trainer.teacher.model.model.layers[0].mlp.up_proj)
    trainer.train()
    assert set(calls) == {(False, torch.float32)}


class OwnTeacher(Teacher):
    """A custom teacher: a linear layer."""

    def __init__(self):
        self.layer, self.dtypes = torch.nn.Linear(1, 97), []

    @torch.no_grad()
    def forward(self, inputs, targets, feature_requests):
        from hf_distill.core.logits import DenseLogits
        from hf_distill.core.signals import Signals

        logits = self.layer(targets.labels[:, None].float())
        self.dtypes.append(logits.dtype)
        return Signals(DenseLogits(logits))


def test_a_custom_teacher_runs_under_the_autocast_of_the_student(make_trainer):
    teacher = OwnTeacher()
    make_trainer(teacher=teacher, bf16=True, use_cpu=True, max_steps=1).train()
    assert set(teacher.dtypes) == {torch.bfloat16}


def with_lora(dtype=torch.float32):
    from peft import LoraConfig, get_peft_model

    student = build("llama", 0).to(dtype)
    return get_peft_model(student, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [EMATeacher, AdapterBaseTeacher])
def test_a_student_with_adapters_runs_in_one_precision_as_student_and_as_teacher(make_trainer, kind, dtype):
    student = with_lora(dtype)
    options = dict(train_dataset=rows("llama", 32), data_collator=collate)
    trainer = make_trainer(
        model=student, teacher=kind(), bf16=True, use_cpu=True, max_steps=1, alpha=1.0, lr_scheduler_type="constant",
        **options,
    )  # fmt: skip
    calls = recorded(student.get_base_model().model.layers[0].mlp.up_proj)
    trainer.train()
    assert set(calls) == {(True, torch.bfloat16)}
    assert trainer.state.log_history[0]["kl"] == 0  # the adapters are zero before the first step


def test_an_ema_teacher_is_not_computed_from_casts_of_the_students_weights(make_trainer):
    """Autocast caches the casts of trained weights; the EMA puts other values into the same parameters."""
    student = build("llama", 0)
    trainer = make_trainer(model=student, teacher=EMATeacher(decay=0.999), bf16=True, use_cpu=True, learning_rate=0.1)
    trainer.train()
    batch = collate(rows("llama", 4))
    teacher = trainer.teacher
    with teacher.swapped_weights():
        copied = build("llama", 0)
        copied.load_state_dict(student.state_dict(), strict=False)
    losses = []
    for each in (teacher, FrozenTeacher(copied)):
        each.prepare(student, torch.device("cpu")) if each is not teacher else None
        for _ in range(2):  # also once the output head is measured
            losses.append(Distiller(objective(1.0, 1.0), autocast_dtype=torch.bfloat16)(student, each, batch).loss)
    assert torch.stack(losses).sub(losses[0]).abs().max() < 2e-2 * losses[0]
    with torch.autocast("cpu", torch.bfloat16):  # a loop of one's own
        inside = Distiller(objective(1.0, 1.0))(student, teacher, batch).loss
    torch.testing.assert_close(inside, losses[0], rtol=2e-2, atol=0)


def test_the_objective_in_mixed_precision_is_close_to_that_in_float32():
    student, batch, losses = build("llama", 0), collate(rows("llama", 4)), []
    for dtype in (None, torch.bfloat16):
        teacher = FrozenTeacher(large())
        teacher.prepare(student, torch.device("cpu"))
        losses.append(Distiller(objective(0.5, 2.0), autocast_dtype=dtype)(student, teacher, batch).loss)
    assert losses[0] != losses[1]
    torch.testing.assert_close(losses[0], losses[1], rtol=2e-2, atol=0)
