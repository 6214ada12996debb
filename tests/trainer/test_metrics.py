"""Metrics in training logs and evaluation, and the choice of the best checkpoint."""

import logging
import math

import pytest
import torch
from tiny import build, collate, rows
from transformers import TrainerCallback, TrainingArguments

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.core.targets import Targets
from hf_distill.losses.objective import RESERVED_NAMES, objective
from hf_distill.losses.token_metrics import PAIR_METRICS, STUDENT_METRICS, greater_is_better
from hf_distill.teachers import EMATeacher, PeerTeacher
from hf_distill.trainer.distiller import StepOutput
from hf_distill.trainer.metrics import MetricAccumulator, average_metrics

CHECKPOINT_OPTIONS = dict(
    max_steps=4,
    learning_rate=0.05,
    eval_strategy="steps",
    eval_steps=1,
    save_strategy="steps",
    save_steps=1,
    load_best_model_at_end=True,
)
ROWS_WITHOUT_TARGETS = [row | {"labels": torch.full_like(row["labels"], -100)} for row in rows("llama", 32)]


@pytest.fixture
def warnings_of(caplog):
    with caplog.at_level(logging.WARNING, "hf_distill"):
        yield lambda part: [r.getMessage() for r in caplog.records if part in r.getMessage()]


def logs_of(trainer, key="loss"):
    return [log for log in trainer.state.log_history if key in log]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def step_of(labels, **per_token):
    """The output of a step whose terms have the given losses at its target tokens; labels are not shifted."""
    targets = Targets.from_batch({"labels": torch.tensor(labels)}, shift=False)
    return StepOutput(torch.zeros(()), {k: torch.tensor(v) for k, v in per_token.items()}, targets, None)


# Sums without a Trainer


def test_means_are_over_the_target_tokens_of_applied_steps_only():
    metrics, terms = MetricAccumulator(), [term for term in objective(0.0, 2.0) if term.name == "hard"]
    steps = [
        (True, [step_of([[1, 2], [3, -100]], hard=[1.0, 2.0, 3.0]), step_of([[4, -100]], hard=[10.0])]),
        (False, [step_of([[1, 2]], hard=[math.nan, 50.0])]),
        (True, [step_of([[-100, 5]], hard=[4.0])]),
    ]
    for is_applied, micro_batches in steps:
        for step in micro_batches:
            metrics.add_micro_batch(step)
        metrics.commit_step(is_applied)
    sums = metrics.take_train_sums(lambda tensor, reduction: 3 * tensor)  # three ranks with the same sums
    assert sums == {"hard": 60.0, "target_tokens": 15.0}
    assert average_metrics(sums, terms) == {"hard_loss": 4.0}
    assert metrics.take_train_sums(lambda tensor, reduction: tensor) == {}


def test_steps_without_target_tokens_correct_each_log_and_the_whole_training():
    metrics, cpu = MetricAccumulator(), torch.device("cpu")
    assert metrics.take_loss_correction() == metrics.train_loss_correction() == 1.0
    for num_items in (8, 0, torch.tensor(0), 3):
        metrics.count_step(num_items, cpu)
    assert metrics.take_loss_correction() == 2.0
    metrics.count_step(1, cpu)
    assert metrics.train_loss_correction() == 5 / 3
    metrics.reset_training()
    metrics.count_step(0, cpu)
    assert math.isnan(metrics.take_loss_correction())


def test_evaluation_sums_leave_out_repeated_rows():
    metrics = MetricAccumulator()
    metrics.add_evaluation_batch(step_of([[1, 2]], hard=[9.0, 9.0]), lambda table: table)  # outside of an evaluation
    metrics.start_evaluation()
    metrics.add_evaluation_batch(step_of([[1, 2], [3, 4]], hard=[1.0, 2.0, 3.0, 4.0]), lambda table: table)
    metrics.add_evaluation_batch(step_of([[5, -100], [1, 2]], hard=[6.0, 1.0, 2.0]), lambda table: table[:1])
    sums, _ = metrics.finish_evaluation("Evaluation")
    assert sums == {"hard": 16.0, "target_tokens": 5.0}
    assert metrics.finish_evaluation("Evaluation") == ({}, {})


# No target tokens


def test_an_evaluation_without_target_tokens_is_nan_and_never_the_best(make_trainer, warnings_of):
    trainer = make_trainer(eval_dataset=ROWS_WITHOUT_TARGETS[:5], metric_for_best_model="eval_kl", **CHECKPOINT_OPTIONS)
    trainer.train()
    metrics = logs_of(trainer, "eval_loss")[-1]
    numbers = {k: v for k, v in metrics.items() if k.startswith("eval_") and "second" not in k and "runtime" not in k}
    assert {"eval_loss", "eval_kl", "eval_perplexity", "eval_teacher_perplexity", "eval_agreement"} <= {*numbers}
    assert all(math.isnan(value) for value in numbers.values())
    assert len(warnings_of("Evaluation found no target token")) == 4
    assert trainer.state.best_model_checkpoint is None


def test_training_without_target_tokens_logs_nan(make_trainer, warnings_of):
    trainer = make_trainer(train_dataset=ROWS_WITHOUT_TARGETS, max_steps=2)
    output = trainer.train()
    for log in logs_of(trainer):
        assert all(math.isnan(log[name]) for name in ("loss", "soft_loss", "hard_loss", "kl"))
    assert math.isnan(output.training_loss)
    assert len(warnings_of("Training found no target token")) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_steps_without_target_tokens_do_not_lower_the_logged_loss(make_trainer, accumulation):
    size = 4 * accumulation
    mixed = rows("llama", size) + ROWS_WITHOUT_TARGETS[:size]
    options = dict(learning_rate=0.0, train_sampling_strategy="sequential", gradient_accumulation_steps=accumulation)
    full = make_trainer(train_dataset=mixed[:size], max_steps=1, **options)
    full.train()
    half = make_trainer(train_dataset=mixed, max_steps=2, logging_steps=2, **options)
    half.train()
    expected = logs_of(full)[0]
    for name in ("loss", "soft_loss", "kl"):
        assert logs_of(half)[0][name] == pytest.approx(expected[name], rel=1e-5)


# The best evaluation


@pytest.mark.parametrize(
    ("metric", "greater"),
    [
        ("kl", False),
        ("eval_kl", False),
        ("eval_code_kl", False),
        ("perplexity", False),
        ("eval_hard_loss", False),
        ("soft_loss_code", False),
        ("eval_soft_big_loss_code", False),
        ("aux_loss", False),
        ("eval_agreement", True),
        ("mean_token_accuracy", True),
        ("rouge", None),
        ("accuracy", True),
    ],
)
def test_greater_is_better_is_set_for_every_metric(metric, greater):
    assert greater_is_better(metric) is greater
    args = DistillConfig("out", metric_for_best_model=metric)
    assert args.greater_is_better is (True if greater is None else greater)  # the default of transformers
    for chosen in (True, False):
        assert DistillConfig("out", metric_for_best_model=metric, greater_is_better=chosen).greater_is_better is chosen


def test_an_entropy_needs_an_explicit_greater_is_better():
    with pytest.raises(DistillError, match="neither a greater nor a smaller value of it is better"):
        DistillConfig("out", metric_for_best_model="eval_student_entropy")
    assert DistillConfig("out", metric_for_best_model="eval_student_entropy", greater_is_better=True).greater_is_better


@pytest.mark.parametrize(("metric", "best"), [("eval_kl", min), ("agreement", max)])
def test_the_best_checkpoint_has_the_best_metric(make_trainer, metric, best):
    trainer = make_trainer(metric_for_best_model=metric, **CHECKPOINT_OPTIONS)
    trainer.train()
    name = "eval_" + metric.removeprefix("eval_")
    assert trainer.state.best_metric == best(log[name] for log in logs_of(trainer, name))


def test_greater_is_better_of_plain_arguments_is_corrected_with_a_warning(tmp_path, warnings_of):
    args = TrainingArguments(str(tmp_path), metric_for_best_model="kl", report_to="none", dataloader_pin_memory=False)
    assert args.greater_is_better
    DistillTrainer(build("llama"), args, collate, rows("llama", 8), teacher=build("llama", 1))
    assert not args.greater_is_better
    assert len(warnings_of("the smallest value is the best")) == 1


# Metrics of the last steps, and of steps that are skipped or repeated


@pytest.mark.parametrize(("steps", "stop", "logged"), [(3, None, [3]), (7, None, [5, 7]), (9, 7, [5, 7]), (9, 5, [5])])
def test_the_last_steps_are_logged_when_training_ends(make_trainer, steps, stop, logged):
    every = make_trainer(max_steps=steps)
    every.train()
    trainer = make_trainer(max_steps=steps, logging_steps=5, callbacks=[StopAt(stop)])
    trainer.train()
    assert [log["step"] for log in logs_of(trainer)] == logged
    last = logs_of(trainer)[-1]
    since = [log for log in logs_of(every) if (logged[-2] if len(logged) > 1 else 0) < log["step"] <= logged[-1]]
    assert last["loss"] == pytest.approx(sum(log["loss"] for log in since) / len(since), rel=1e-4)
    assert {"soft_loss", "hard_loss", "kl"} <= {*last}


def test_logging_strategy_no_logs_nothing_when_training_ends(make_trainer):
    trainer = make_trainer(logging_strategy="no", max_steps=2)
    trainer.train()
    assert not logs_of(trainer)


def test_a_batch_that_ran_out_of_memory_is_not_counted(make_trainer):
    class DoesNotFit(DistillTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs, num_items_in_batch)
            if (
                len(inputs["labels"]) > 2 and len(self.nonfinite_guard._micro_batch_losses) == 2
            ):  # in the second micro-batch
                raise RuntimeError("CUDA out of memory.")
            return loss

    options = dict(gradient_accumulation_steps=2, max_steps=1, learning_rate=0.0)
    trainer = make_trainer(auto_find_batch_size=True, **options)
    trainer.__class__ = DoesNotFit
    trainer.train()
    expected = make_trainer(per_device_train_batch_size=2, **options)
    expected.train()
    for name in ("loss", "soft_loss", "hard_loss", "kl", "student_entropy"):
        assert logs_of(trainer)[0][name] == pytest.approx(logs_of(expected)[0][name], rel=1e-5)


def test_the_loss_is_nan_if_every_step_is_skipped(make_trainer):
    trainer = make_trainer(max_steps=2, logging_steps=2)
    trainer.model.lm_head.weight.register_hook(lambda grad: grad * math.inf)
    output = trainer.train()
    (log,) = logs_of(trainer)
    assert log["skipped_steps"] == 2
    assert math.isnan(log["loss"])
    assert math.isnan(output.training_loss)


# Names


def test_statistics_are_reserved_names():
    assert {*STUDENT_METRICS, *PAIR_METRICS} <= {*RESERVED_NAMES}


@pytest.mark.parametrize("name", ["student_ce", "measured", "teacher_entropy", "aux"])
def test_a_loss_with_the_name_of_a_statistic_changes_no_metric(make_trainer, name):
    from hf_distill.losses import LOSSES, loss

    plain = make_trainer().evaluate()
    loss(name, compares=())(lambda student, teacher, targets: torch.full_like(targets.labels, 9.0, dtype=torch.float32))
    try:
        metrics = make_trainer(losses=[{"name": name, "weight": 0.0}]).evaluate()
    finally:
        del LOSSES[name]
    assert metrics[f"eval_{name}_2_loss"] == pytest.approx(9.0)
    for key in ("eval_loss", "eval_kl", "eval_perplexity", "eval_teacher_entropy"):
        assert metrics[key] == pytest.approx(plain[key], rel=1e-6)


@pytest.mark.parametrize(
    ("name", "teacher"),
    [
        ("peer_hard", lambda: PeerTeacher(build("llama", 1))),
        ("soft_a", lambda: {"a": build("llama", 1), "b": EMATeacher()}),
    ],
)
def test_a_loss_with_the_name_of_a_teachers_loss_raises_an_error(make_trainer, name, teacher):
    from hf_distill.losses import LOSSES, loss

    loss(name, compares=())(lambda student, teacher, targets: torch.zeros(len(targets)))
    try:
        with pytest.raises(DistillError, match=f"2 losses have the name '{name}'"):
            make_trainer(teacher=teacher(), losses=[{"name": name, "weight": 1.0}])
    finally:
        del LOSSES[name]
