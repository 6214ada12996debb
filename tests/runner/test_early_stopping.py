"""Early stopping: at the right evaluation, with the best checkpoint exported, and at the same step when resumed."""

import json
import math

import pytest
from safetensors.torch import load_file
from tiny import build, collate, rows
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_distill import DistillConfig, DistillError, DistillTrainer
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.runner.early_stopping import evaluations_since_best, stopping_note


@pytest.mark.parametrize(
    ("values", "greater", "since"),
    [
        ([], False, 0),
        ([3.0, 2.0, 1.0], False, 0),
        ([3.0, 2.0, 2.0, 2.5], False, 2),
        ([1.0, 2.0, 1.5], True, 1),
        ([1.0, math.nan, math.nan], False, 2),
        ([math.nan, 1.0], False, 0),
    ],
)
def test_evaluations_since_the_best_one_are_counted(values, greater, since):
    assert evaluations_since_best(values, greater) == since


def recipe(folder, *overrides):
    """A recipe whose learning rate is so high that the held-out loss rises after the first steps."""
    words = [f"train.output_dir={folder}", "train.max_steps=12", "train.eval_steps=1", "train.eval_strategy=steps"]
    words += ["train.early_stopping_patience=2", "train.learning_rate=0.3", "train.save_steps=null", "control=sft"]
    return load_recipe("quickstart", [*words, "train.max_grad_norm=100", *overrides], smoke=True)


class Stop(TrainerCallback):
    """Ends the process where training has ended, before the student is saved."""

    def on_train_end(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def test_early_stopping_exports_the_best_checkpoint_and_a_resumed_run_stops_at_the_same_step(tmp_path):
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    result = run_recipe(recipe(straight))
    logs = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    for name, home in (("student", straight), ("control", straight / "control")):
        evaluations = [log for log in logs if log["run"] == name and "eval_loss" in log and log["step"]]
        losses = {
            log["step"]: log["eval_loss"] for log in reversed(evaluations)
        }  # the last one is of the exported student
        best = min(losses, key=losses.get)
        assert max(losses) == best + 2 < 12, losses
        saved = load_file(home / f"checkpoint-{best}" / "model.safetensors")
        exported = load_file(straight / name / "model.safetensors")
        assert all(exported[key].equal(value) for key, value in saved.items())
        if name == "student":
            assert result.models[name]["loss"] == pytest.approx(losses[best], rel=1e-5)
        assert json.loads((straight / "results.json").read_text())["steps"][name] == best
    with pytest.raises(KeyboardInterrupt):
        run_recipe(recipe(cut), callbacks=[Stop()])
    run_recipe(recipe(cut), resume=True)
    for name in ("student", "control"):
        one, other = (load_file(folder / name / "model.safetensors") for folder in (straight, cut))
        assert all(one[key].equal(value) for key, value in other.items())


def test_a_comparison_of_different_steps_has_a_note():
    assert stopping_note({"student": 8, "control": 8}) is stopping_note({"student": 8}) is stopping_note({}) is None
    assert stopping_note({"student": 8, "control": 12}).startswith(
        "The student is the checkpoint of step 8, and the control that of step 12"
    )


def test_transformers_early_stopping_works_in_a_script(tmp_path):
    """The example of docs/early-stopping.md."""
    args = DistillConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to=[], max_steps=12, eval_strategy="steps", eval_steps=1,
        save_strategy="steps", save_steps=1, load_best_model_at_end=True, metric_for_best_model="kl",
        learning_rate=0.5, max_grad_norm=100.0, per_device_train_batch_size=2,
    )  # fmt: skip
    trainer = DistillTrainer(
        build("llama", 0), args, teacher=build("llama", 1), train_dataset=rows("llama", 8), data_collator=collate,
        eval_dataset=rows("llama", 4), callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )  # fmt: skip
    trainer.train()
    kl = {log["step"]: log["eval_kl"] for log in trainer.state.log_history if "eval_kl" in log}
    best = min(kl, key=kl.get)
    assert trainer.state.global_step == best + 2 < 12, kl
    assert trainer.evaluate()["eval_kl"] == pytest.approx(kl[best], rel=1e-5)


PLAIN = "train={output_dir: x, eval_strategy: steps, eval_steps: 2, early_stopping_patience: 1}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.early_stopping_patience=0", "Input should be greater than or equal to 1"),
        ("train.eval_strategy=no", "it needs evaluations during training"),
        ("train.save_strategy=epoch", "remove save_strategy"),
        ("train.save_steps=3", "save_steps is 3; it must be a multiple of eval_steps, which is 2"),
        ("train.load_best_model_at_end=false", "it always exports the best checkpoint"),
    ],
)
def test_a_recipe_that_cannot_stop_early_is_refused(override, message):
    with pytest.raises(DistillError, match=message):
        load_recipe("quickstart", [PLAIN, override])
    assert load_recipe("quickstart", [PLAIN]).train.early_stopping_patience == 1
