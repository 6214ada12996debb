"""Without a teacher, or with alpha = 0, training is bit-identical to that of `transformers.Trainer`."""

import math
from pathlib import Path

import pytest
import torch
from tiny import KINDS, build
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_distill import DistillTrainer
from hf_distill.trainer.checkpoints import MARK_FILE

STEPS = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, logging_steps=5)


def train_and_evaluate(trainer):
    trainer.train()
    losses = [{k: log[k] for k in ("loss", "grad_norm") if k in log} for log in trainer.state.log_history]
    metrics = trainer.evaluate()
    timing = ("runtime", "per_second", "preparation_time")
    return losses, {k: v for k, v in metrics.items() if not k.endswith(timing)}, trainer.model.state_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["no teacher", "alpha 0"])
def test_training_without_distillation_is_bit_identical_to_the_trainers(make_trainer, kind, variant):
    options = {"teacher": None} if variant == "no teacher" else {"teacher": build(kind, 1), "alpha": 0.0}
    model = lambda: build(kind, 0, dropout=0.1)  # noqa: E731
    plain = train_and_evaluate(make_trainer(kind, cls=Trainer, model=model(), **STEPS))
    distilled = train_and_evaluate(make_trainer(kind, cls=DistillTrainer, model=model(), **STEPS, **options))
    assert distilled[0] == plain[0]
    assert distilled[1] == plain[1]
    assert distilled[2].keys() == plain[2].keys()
    assert all(torch.equal(distilled[2][name], plain[2][name]) for name in plain[2])


def test_label_smoothing_without_a_teacher_equals_the_trainers(make_trainer):
    plain = train_and_evaluate(make_trainer(cls=Trainer, label_smoothing_factor=0.1))
    distilled = train_and_evaluate(make_trainer(teacher=None, label_smoothing_factor=0.1))
    assert distilled[:2] == plain[:2]


def test_the_arguments_have_the_positions_of_the_trainers(tmp_path):
    from inspect import signature

    from tiny import collate, rows

    from hf_distill import DistillConfig

    data = rows("llama")
    trainer = DistillTrainer(build("llama"), DistillConfig(str(tmp_path)), collate, data, data[:4], None, teacher=None)
    assert (trainer.data_collator, trainer.train_dataset, trainer.eval_dataset) == (collate, data, data[:4])
    for name in list(signature(Trainer.__init__).parameters)[1:]:
        DistillTrainer(
            **{"model": build("llama"), "args": DistillConfig(str(tmp_path))}
            | ({name: None} if name not in ("model", "args", "optimizers") else {})
        )
    with pytest.raises(TypeError, match="train_datasets"):
        DistillTrainer(build("llama"), DistillConfig(str(tmp_path)), train_datasets=data)


def test_a_missing_teacher_is_logged_once(make_trainer, caplog):
    from hf_distill.trainer.teacher_argument import logger

    logger.warning_once.cache_clear()
    make_trainer(teacher=None)
    make_trainer(teacher=None)
    make_trainer(teacher=None, alpha=0.0)
    assert [r.message for r in caplog.records].count(
        "There is no teacher, so this trains on the labels alone. Pass `teacher=` to the trainer to distill."
    ) == 1


class Line(nn.Module):
    """A module that is not a PreTrainedModel: it has no config and returns a tuple."""

    def __init__(self):
        super().__init__()
        self.slope, self.offset = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

    def forward(self, x, labels=None):
        y = x * self.slope + self.offset + 0.01 * torch.randn(())
        return (y,) if labels is None else (nn.functional.mse_loss(y, labels), y)


class Events(TrainerCallback):
    """Records each event and its step."""

    def __init__(self):
        self.recorded = []


for name in [name for name in dir(TrainerCallback) if name.startswith("on_")]:
    setattr(
        Events,
        name,
        lambda self, args, state, control, event=name, **kwargs: self.recorded.append((event, state.global_step)),
    )


def line_trainer(cls, folder, **options):
    class Logging(cls):
        def log(self, logs, *args):
            super().log(logs | {"offset": self.model.offset.item()}, *args)

    x = torch.randn(24, generator=torch.Generator().manual_seed(0))
    data = [{"x": value, "labels": 2 * value + 3} for value in x]
    arguments = dict(per_device_train_batch_size=2, learning_rate=0.1, max_steps=20, report_to=[]) | options
    return Logging(
        Line(),
        TrainingArguments(str(folder), **arguments),
        train_dataset=data,
        eval_dataset=data[:6],
        callbacks=[Events()],
        compute_metrics=lambda predictions: {"spread": float(predictions.predictions.std())},
    )


def outcome(trainer, resume_from_checkpoint=None):
    """Return the results of a training: output, logs, weights, random state, events, files."""
    result = trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    predictions = trainer.predict(trainer.eval_dataset)
    timing = ("runtime", "per_second", "preparation_time")
    logs = [result.metrics, predictions.metrics, *trainer.state.log_history]
    events = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Events))
    folder = trainer.args.output_dir
    return (
        (result.global_step, result.training_loss, trainer.state.best_metric, trainer.state.best_global_step),
        [{key: value for key, value in log.items() if not key.endswith(timing)} for log in logs],
        predictions.predictions.tolist(),
        [parameter.item() for parameter in trainer.model.parameters()],
        torch.get_rng_state().tolist(),
        events.recorded,
        sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.name != MARK_FILE),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"save_steps": 6, "save_total_limit": 2, "logging_steps": 3, "gradient_accumulation_steps": 3},
        {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 4, "load_best_model_at_end": True, "seed": 1},
        {"eval_strategy": "steps", "eval_steps": 3, "save_steps": 2, "metric_for_best_model": "spread"},
        {"eval_strategy": "epoch", "save_strategy": "best", "metric_for_best_model": "loss", "save_total_limit": 1},
        {"eval_strategy": "epoch", "lr_scheduler_type": "reduce_lr_on_plateau", "save_only_model": True},
        {"per_device_eval_batch_size": 2, "eval_accumulation_steps": 1, "save_strategy": "no", "max_grad_norm": 0},
    ],
    ids=lambda options: next(iter(options)) + "=" + str(next(iter(options.values()))),
)
def test_any_module_trains_and_saves_as_with_the_trainer(tmp_path, options):
    plain = outcome(line_trainer(Trainer, tmp_path / "plain", **options))
    distilled = outcome(line_trainer(DistillTrainer, tmp_path / "ours", **options))
    assert distilled == plain


def test_resuming_gives_the_results_and_files_of_the_trainer(tmp_path):
    options = {"save_steps": 6, "logging_steps": 3, "gradient_accumulation_steps": 2}
    outcomes = []
    for cls in (Trainer, DistillTrainer):
        folder = tmp_path / cls.__name__
        uninterrupted = outcome(line_trainer(cls, folder, **options))
        resumed = outcome(line_trainer(cls, folder, **options), str(folder / "checkpoint-6"))
        assert resumed[2] == uninterrupted[2]
        outcomes.append((uninterrupted, resumed))
    assert outcomes[0] == outcomes[1]
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
        line_trainer(DistillTrainer, tmp_path / "other").train(resume_from_checkpoint=str(tmp_path / "none"))


def test_resuming_a_finished_training_runs_no_step(tmp_path):
    """Unlike this class, `Trainer` runs a step beyond `max_steps`, or reports a loss of 0."""
    uninterrupted = line_trainer(DistillTrainer, tmp_path, max_steps=4)
    uninterrupted.train()
    resumed = line_trainer(DistillTrainer, tmp_path, max_steps=4)
    output = resumed.train(resume_from_checkpoint=True)
    assert output.global_step == 4
    assert math.isnan(output.training_loss)
    assert "train_runtime" in output.metrics
    assert not any("train_loss" in values for values in (output.metrics, resumed.state.log_history[-1]))
    assert [value.item() for value in resumed.model.parameters()] == [
        value.item() for value in uninterrupted.model.parameters()
    ]
