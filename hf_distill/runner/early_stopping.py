"""Early stopping in recipes: `train.early_stopping_patience`."""

from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EarlyStopping(TrainerCallback):
    """Stops training after a number of evaluations without an improvement of `metric_for_best_model`.

    transformers' `EarlyStoppingCallback` counts in an attribute, which is lost when training is resumed. This callback
    counts in the log history, which is part of each checkpoint, so a resumed training stops at the same step.

    Args:
        patience: Number of evaluations without an improvement after which training stops.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop immediately if training is resumed from the checkpoint at which it stopped."""
        control.should_training_stop |= self._is_exhausted(args, state.log_history)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Stop if the last `patience` evaluations did not improve."""
        control.should_training_stop |= self._is_exhausted(args, state.log_history)

    def _is_exhausted(self, args: TrainingArguments, history: list[dict[str, float]]) -> bool:
        name = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        values = [log[name] for log in history if name in log and log["step"] > 0]
        return evaluations_since_best(values, bool(args.greater_is_better)) >= self.patience


def evaluations_since_best(values: list[float], greater_is_better: bool) -> int:
    """Count the values after the best one. NaN is never better."""
    since, best = 0, None
    for value in values:
        better = value == value and (best is None or (value > best if greater_is_better else value < best))
        since, best = (0, value) if better else (since + 1, best)
    return since


def stopping_note(steps: Mapping[str, int]) -> str | None:
    """Return a note for tables in which student and control were trained for different numbers of steps, else None.

    Args:
        steps: Step of the exported model, for "student" and "control".
    """
    student, control = steps.get("student"), steps.get("control")
    if student is None or control is None or student == control:
        return None
    return (
        f"The student is the checkpoint of step {student}, and the control that of step {control}: each is the best "
        "checkpoint of its training, so they are not compared at the same number of steps."
    )


def stopping_arguments(train: dict[str, Any]) -> dict[str, Any]:
    """Return the training arguments with which early stopping exports the best checkpoint.

    Args:
        train: Values of the section `train` of a recipe, without `early_stopping_patience`.

    Returns:
        `train` with `load_best_model_at_end`, and with defaults that save a checkpoint at each evaluation and select
        the best by the held-out loss.
    """
    saving = {"save_strategy": train["eval_strategy"]}
    if "eval_steps" in train:
        saving["save_steps"] = train["eval_steps"]
    if "metric_for_best_model" not in train:
        saving |= {"metric_for_best_model": "loss", "greater_is_better": False}
    return {**saving, **train, "load_best_model_at_end": True}
