"""Example scripts of transformers distill after one change: another trainer class, and `teacher=`."""

import pytest
import torch
from example_scripts import BASES, DISTILLING, SCRIPTS, Situation

STEPS = dict(max_steps=20, gradient_accumulation_steps=2, per_device_train_batch_size=2, per_device_eval_batch_size=3)
OPTIONS = dict(logging_steps=5, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False)


def run(situation: Situation, classes: tuple[type, type], folder, steps: int = 20, **trainer):
    """Train, evaluate and predict as a script does; return the losses, metrics, predictions and weights."""
    cls, config = situation.subclass(classes[0]), classes[1]
    args = config(str(folder), **STEPS | OPTIONS | situation.fields | {"max_steps": steps})
    model = situation.model(0)
    made = cls(model=model, args=args, **situation.trainer, **trainer)
    made.train()
    losses = [{k: log[k] for k in ("loss", "grad_norm") if k in log} for log in made.state.log_history]
    timing = ("runtime", "per_second", "preparation_time")
    metrics = {name: value for name, value in made.evaluate().items() if not name.endswith(timing)}
    return losses, metrics, made.predict(situation.trainer["eval_dataset"]).predictions, made


def tensors(predictions):
    return predictions if isinstance(predictions, tuple) else (predictions,)


@pytest.mark.parametrize("name", SCRIPTS)
def test_without_a_teacher_a_script_is_bit_identical(name, tmp_path):
    situation = SCRIPTS[name]()
    losses, metrics, predictions, trainer = run(situation, BASES[situation.base], tmp_path)
    ours = run(situation, DISTILLING[situation.base], tmp_path)
    assert ours[0] == losses
    assert ours[1] == metrics
    for ours_of, theirs in zip(tensors(ours[2]), tensors(predictions), strict=True):
        assert (ours_of == theirs).all()
    weights = trainer.model.state_dict()
    assert all(torch.equal(value, weights[key]) for key, value in ours[3].model.state_dict().items())


@pytest.mark.parametrize("name", SCRIPTS)
def test_with_a_teacher_a_script_trains_evaluates_predicts_and_saves(name, tmp_path):
    situation = SCRIPTS[name]()
    plain = run(situation, BASES[situation.base], tmp_path / "plain", steps=1)
    _losses, metrics, predictions, trainer = run(
        situation, DISTILLING[situation.base], tmp_path, 4, teacher=situation.model(1, 3)
    )
    assert {"soft_loss", "hard_loss"} <= trainer.state.log_history[0].keys()
    assert plain[1].keys() <= metrics.keys(), "the metrics of the script are there"
    assert {name: metrics[name] for name in metrics if metrics[name] != metrics[name]} == {}, "no metric is NaN"
    assert [x.shape for x in tensors(predictions)] == [x.shape for x in tensors(plain[2])]
    trainer.save_model()
    reloaded = type(trainer.model).from_pretrained(tmp_path)
    assert all(torch.equal(v, reloaded.state_dict()[k]) for k, v in trainer.model.state_dict().items())
