"""Steps whose loss or gradient is not finite are skipped and reported, and training stops after some."""

import json
import logging
import math
import re
from types import SimpleNamespace

import pytest
import torch
from tiny import build, collate, rows
from transformers import TrainerCallback, TrainingArguments

from hf_distill import DistillConfig, DistillError
from hf_distill.cache.example_keys import batch_examples
from hf_distill.core import run_files
from hf_distill.core.targets import Targets
from hf_distill.errors import RunError
from hf_distill.teachers import FrozenTeacher, PeerTeacher
from hf_distill.trainer.nonfinite import NonFiniteGuard
from hf_distill.trainer.nonfinite_report import LossSpikeDetector

ROWS = rows("llama", 32)
BAD_ROW = 6  # index of the row in ROWS for which the broken teacher fails


class BrokenTeacher(FrozenTeacher):
    """Returns hidden states that are not finite for one row, or for some tokens in some calls."""

    def __init__(self, model, row=None, calls=(), value=math.nan):
        super().__init__(model)
        self.row, self.calls, self.value, self.called = row, calls, value, 0

    def forward(self, inputs, targets, feature_requests):
        signals = super().forward(inputs, targets, feature_requests)
        if not self.model.training and torch.is_grad_enabled():
            self.called += 1
        broken = torch.zeros(len(targets), dtype=torch.bool)
        if self.row is not None:
            same = [torch.equal(ids, ROWS[self.row]["input_ids"]) for ids in inputs["input_ids"]]
            broken = torch.tensor(same)[targets.batch_rows]
        if self.called in self.calls:
            broken[3:5] = True
        signals.logits.hidden[broken] = self.value
        return signals


class WeightRecorder(TrainerCallback):
    def __init__(self):
        self.history = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.history.append({name: p.detach().clone() for name, p in model.named_parameters()})


def equal(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def warnings(caplog):
    with caplog.at_level(logging.WARNING, "hf_distill.trainer.nonfinite"):
        yield caplog


def broken_teacher(**options):
    return BrokenTeacher(build("llama", 1, layers=3, width=48), **options)


def test_the_guard_skips_counts_and_stops_without_a_trainer(tmp_path, warnings):
    model, args = torch.nn.Linear(2, 1), TrainingArguments(str(tmp_path), use_cpu=True)
    accelerator = SimpleNamespace(num_processes=1, scaler=None, state=None, reduce=lambda tensor, reduction: tensor)
    guard, loss_sum = NonFiniteGuard(max_consecutive_steps=2), torch.tensor(5.0)

    def run_step(step: int, losses: list[float], norm: float) -> bool:
        model.weight.grad = torch.ones_like(model.weight)
        for loss in losses:
            guard.start_micro_batch(loss_sum)
            guard.add_loss(torch.tensor(loss))
        if not (is_finite := guard.check_step(norm, accelerator)):
            guard.skip_step(model, args, accelerator, step - 1, 0.1, tokenizer=None)
            assert model.weight.grad is None
        return is_finite

    assert guard.check_step(1.0, accelerator) is None
    assert [run_step(1, [1.0, 2.0], 1.0), run_step(2, [1.0, math.nan], 1.0)] == [True, False]
    assert guard.loss_sum_before == loss_sum
    logs = {"loss": 1.5}  # the loss of the skipped step is not in the Trainer's sum
    guard.add_to_log(logs, accelerator, step=2)
    assert logs == {"loss": 3.0, "skipped_steps": 1}
    assert guard.train_loss_correction() == 2.0
    assert [run_step(3, [1.0], 1.0), run_step(4, [1.0], math.inf)] == [True, False]
    with pytest.raises(RunError, match="Training stops at step 5 after 2 consecutive steps"):
        run_step(5, [math.inf], 1.0)
    assert [step["step"] for step in json.loads((tmp_path / run_files.NONFINITE_STEPS).read_text())["steps"]] == [4, 5]
    guard.reset()
    assert guard.train_loss_correction() == 1.0


def test_a_nonfinite_step_is_skipped_counted_and_reported(make_trainer, warnings):
    weights = WeightRecorder()
    trainer = make_trainer(
        teacher=broken_teacher(row=BAD_ROW), callbacks=[weights], max_steps=8, logging_steps=2, train_dataset=ROWS
    )
    trainer.train()
    (warning,) = [r.getMessage() for r in warnings.records if "is skipped" in r.getMessage()]
    step = int(warning.split()[1])
    batch = collate([ROWS[BAD_ROW]])
    targets = Targets.from_batch(batch, shift=True)
    assert batch_examples(batch, targets)[0].key.hex() in warning
    assert f"soft: not finite for {len(targets)} of " in warning
    assert f"token {int(targets.labels[0])} at position {int(targets.positions[0])}" in warning
    assert "hard is finite there" in warning
    after = [*weights.history, {name: p.detach() for name, p in trainer.model.named_parameters()}]
    assert [equal(after[i], after[i + 1]) for i in range(8)] == [i == step - 1 for i in range(8)]
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert {log["step"]: log.get("skipped_steps", 0) for log in logs} == {
        at: int(at - 1 <= step <= at) for at in (2, 4, 6, 8)
    }
    assert all("soft_loss" in log and math.isfinite(value) for log in logs for value in log.values())
    assert all(p.isfinite().all() for p in trainer.model.parameters())


@pytest.mark.parametrize("is_filtered", [True, False])
def test_logged_losses_are_means_over_the_finite_steps(make_trainer, is_filtered):
    options = {"max_steps": 4, "logging_steps": 4, "learning_rate": 0.0, "logging_nan_inf_filter": is_filtered}
    trainer = make_trainer(teacher=broken_teacher(row=BAD_ROW), train_dataset=ROWS[: 4 * 4], **options)
    losses, training_step = [], trainer.training_step
    trainer.training_step = lambda *args, **kwargs: losses.append(training_step(*args, **kwargs)) or losses[-1].clone()
    output = trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["skipped_steps"] == 1
    losses = [float(loss) for loss in losses if math.isfinite(loss)]
    assert len(losses) == 3
    assert log["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert output.training_loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_training_stops_after_consecutive_nonfinite_steps_and_can_resume(make_trainer, tmp_path):
    steps = range(4, 100)
    trainer = make_trainer(
        teacher=broken_teacher(calls=steps),
        max_steps=20,
        save_steps=2,
        save_strategy="steps",
        max_consecutive_nonfinite_steps=3,
    )
    with pytest.raises(RunError) as error:
        trainer.train()
    text = str(error.value)
    assert "stops at step 6 after 3 consecutive steps" in text
    assert re.search(r"Resume from \S*checkpoint-4, which is complete", text)
    assert "the teacher's values may not be" in text
    report = json.loads((tmp_path / "out" / "nonfinite_steps.json").read_text())
    assert [step["step"] for step in report["steps"]] == [4, 5, 6]
    assert report["last_checkpoint"] == "checkpoint-4"
    assert report["steps"][0]["nonfinite_terms"] == ["soft"]
    assert report["steps"][0]["num_nonfinite_tokens"] == 2
    healthy = make_trainer(max_steps=5, save_strategy="no")
    healthy.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert healthy.state.global_step == 5


def test_nonconsecutive_skipped_steps_do_not_stop_training(make_trainer):
    trainer = make_trainer(teacher=broken_teacher(calls=(2, 3, 5, 6)), max_steps=8, max_consecutive_nonfinite_steps=3)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if log.get("skipped_steps")] == [2, 3, 5, 6]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_nonfinite_gradient_skips_the_step_and_its_parameter_is_reported(make_trainer, warnings, max_grad_norm):
    trainer = make_trainer(max_grad_norm=max_grad_norm)
    weights, broken = WeightRecorder(), trainer.model.model.layers[1].mlp.down_proj.weight
    trainer.add_callback(weights)
    broken.register_hook(lambda grad: grad * math.inf if trainer.state.global_step == 1 else grad)
    trainer.train()
    (warning,) = [r.getMessage() for r in warnings.records if "is skipped" in r.getMessage()]
    assert warning.startswith("Step 2 is skipped: every loss is finite")
    assert ("layers.1.mlp.down_proj.weight" in warning) == (
        max_grad_norm > 0
    )  # clipping by a NaN norm makes all gradients NaN
    assert equal(weights.history[1], weights.history[2])
    assert not equal(weights.history[2], weights.history[3])


def test_the_report_says_which_micro_batch_is_not_finite(make_trainer, warnings):
    trainer = make_trainer(
        teacher=broken_teacher(row=BAD_ROW), max_steps=4, gradient_accumulation_steps=2, train_dataset=ROWS
    )
    trainer.train()
    (warning,) = [r.getMessage() for r in warnings.records if "is skipped" in r.getMessage()]
    assert "micro-batch 1" in warning or "micro-batch 0" in warning


def test_an_infinite_loss_with_a_finite_gradient_is_skipped(make_trainer):
    from hf_distill.losses import loss

    @loss("infinite_value", compares={"logits"})
    def infinite_value(student, teacher, targets):
        from hf_distill.losses.alignment import dense_logits

        return (dense_logits(student) ** 2).sum(1) + torch.where(targets.labels == targets.labels[0], math.inf, 0.0)

    weights = WeightRecorder()
    trainer = make_trainer(losses=[{"name": "infinite_value", "weight": 0.1}], callbacks=[weights], max_steps=3)
    trainer.train()
    assert equal(weights.history[0], weights.history[2])


def test_a_nonfinite_gradient_of_a_separately_clipped_peer_skips_the_step(make_trainer, warnings):
    trainer = make_trainer(teacher=PeerTeacher(build("llama", 3)), max_steps=4)
    weights = WeightRecorder()
    trainer.add_callback(weights)
    parameter = next(iter(trainer.teacher.trainable_module.parameters()))
    parameter.register_hook(lambda grad: grad * math.nan if trainer.state.global_step == 1 else grad)
    trainer.train()
    (warning,) = [r.getMessage() for r in warnings.records if "is skipped" in r.getMessage()]
    assert warning.startswith("Step 2 is skipped")
    assert equal(weights.history[1], weights.history[2])
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_a_nonfinite_step_is_skipped_without_a_teacher(make_trainer, warnings):
    trainer = make_trainer(teacher=None, alpha=0.0)
    weights = WeightRecorder()
    trainer.add_callback(weights)
    original = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: original(*a, **k) * (math.nan if trainer.state.global_step == 1 else 1.0)
    trainer.train()
    (warning,) = [r.getMessage() for r in warnings.records if "is skipped" in r.getMessage()]
    assert warning.startswith("Step 2 is skipped: the loss is not finite, but all terms are")
    assert equal(weights.history[1], weights.history[2])


def add_gradient_scaler(trainer, **options):
    """Add a gradient scaler on the CPU, which is unscaled where that of fp16 on a GPU is."""
    scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", **options)
    trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
    return scaler


def test_overflows_do_not_stop_training_while_the_scaler_lowers_its_scale(make_trainer, warnings):
    """The scaler skips a step that overflows and halves its scale, which is not an error."""
    weights = WeightRecorder()
    trainer = make_trainer(max_steps=9, max_consecutive_nonfinite_steps=2, callbacks=[weights])
    scaler = add_gradient_scaler(trainer, init_scale=2.0**6)
    broken = trainer.model.model.layers[0].mlp.down_proj.weight
    broken.register_hook(lambda grad: grad * math.inf if scaler.get_scale() > 4 else grad)
    trainer.train()
    assert scaler.get_scale() == 4
    assert [equal(weights.history[i], weights.history[i + 1]) for i in range(6)] == [True] * 4 + [False] * 2
    assert not [r for r in warnings.records if "is skipped" in r.getMessage()]
    assert sum(log.get("skipped_steps", 0) for log in trainer.state.log_history) == 4


def test_overflows_at_the_lowest_scale_stop_training(make_trainer):
    trainer = make_trainer(max_steps=20, max_consecutive_nonfinite_steps=2)
    add_gradient_scaler(trainer, init_scale=2.0)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    with pytest.raises(RunError, match="step 3 after 2 consecutive steps"):
        trainer.train()


def test_a_nonfinite_loss_with_a_gradient_scaler_is_reported(make_trainer, warnings):
    weights = WeightRecorder()
    trainer = make_trainer(teacher=broken_teacher(calls=(2,)), max_steps=4, callbacks=[weights])
    add_gradient_scaler(trainer, init_scale=2.0**10)
    trainer.train()
    assert [r for r in warnings.records if r.getMessage().startswith("Step 2 is skipped: soft")]
    assert equal(weights.history[1], weights.history[2])
    assert not equal(weights.history[2], weights.history[3])


def test_a_loss_spike_is_far_above_the_median_of_earlier_losses():
    detector = LossSpikeDetector()
    assert [detector.update(5.0 + 0.1 * (i % 5)) for i in range(40)] == [None] * 40
    assert detector.update(5.9) is None
    assert detector.update(9.0) == pytest.approx(5.2)
    assert detector.update(math.nan) is None
    assert detector.update(5.2) is None
    assert LossSpikeDetector().update(9.0) is None
    falling = LossSpikeDetector()
    assert not any(falling.update(8 * 0.97**i) for i in range(200))


def test_a_loss_spike_is_logged_with_its_step(make_trainer, warnings):
    trainer = make_trainer(max_steps=40, learning_rate=0.0, logging_steps=20, train_dataset=ROWS[:4])
    original = trainer.compute_loss

    def compute_loss(*args, **kwargs):
        return original(*args, **kwargs) * (10.0 if trainer.state.global_step == 29 else 1.0)

    trainer.compute_loss = compute_loss
    trainer.train()
    (warning,) = [r.getMessage() for r in warnings.records if "jumped" in r.getMessage()]
    assert "about step 30" in warning
    assert [log.get("loss_spikes") for log in trainer.state.log_history if "loss" in log] == [None, 1]


@pytest.mark.parametrize("value", [0, -1, None, 1.5])
def test_an_invalid_limit_of_nonfinite_steps_raises_an_error(tmp_path, value):
    with pytest.raises(DistillError, match="max_consecutive_nonfinite_steps is"):
        DistillConfig(str(tmp_path), max_consecutive_nonfinite_steps=value)
