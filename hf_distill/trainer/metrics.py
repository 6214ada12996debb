"""Metrics of a distillation, averaged over target tokens: their sums over training steps and evaluations, and means."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.utils import logging

from ..losses.chunk_metrics import average_chunk_metrics
from ..losses.embedding import EMBEDDING_SIMILARITY
from ..losses.objective import Term
from ..losses.token_metrics import greater_is_better
from ..models.type_catalog import ModelType
from .config import DistillArguments
from .distiller import StepOutput
from .source_metrics import average_by_source, origin_label

logger = logging.get_logger(__name__)
_STATISTICS = ("kl", "agreement", "teacher_mse", "teacher_entropy", "student_entropy")  # computed at temperature 1
_NOT_LOGGED = ("measured", "student_ce", "teacher_ce", "accuracy")  # statistics of which other metrics are made
_NO_TARGETS = "no target token (every label is -100)"
_CHECK_LABELS = "Check the labels: rows may be truncated before their targets begin."
TRAIN_STATISTICS_EVERY = 4  # training computes the statistics of every fourth target token, evaluation of all
_MAX_EXP_NATS = 700  # exp of more overflows a float


class MetricAccumulator:
    """Sums the metrics of training steps since the last log, and those of one evaluation, over target tokens.

    A training step calls `add_micro_batch` for each micro-batch, and `commit_step` when the step is applied or skipped.
    An evaluation calls `start_evaluation`, `add_evaluation_batch` for each batch, and `finish_evaluation`.
    """

    def __init__(self) -> None:
        self._eval_sums: list[Tensor] | None = None  # sums of each batch of the running evaluation
        self._eval_names: list[str] = []
        self._eval_rows: dict[str, list[Tensor]] = {}  # of each batch: the sum of its `row_values`, or all of them
        self.reset_training()

    def reset_training(self) -> None:
        """Discard the sums of training; also called when training starts again with a smaller batch size."""
        self._train_sums: dict[str, Tensor] = {}  # sums since the last log
        self._step_sums: dict[str, Tensor] = {}  # sums of the current step
        # Numbers of steps, and of steps with target tokens: since the last log, and in the training before it.
        self._steps = torch.zeros(2, dtype=torch.long)
        self._logged_steps = torch.zeros(2, dtype=torch.long)

    def add_micro_batch(self, step: StepOutput) -> None:
        """Add the values of a micro-batch to the sums of the current training step."""
        for name, values in step.per_token.items():
            self._step_sums[name] = self._step_sums.get(name, 0.0) + values.sum()
        count = torch.full((), float(len(step.targets)), device=step.loss.device)  # written by the device, no copy
        self._step_sums["target_tokens"] = self._step_sums.get("target_tokens", 0.0) + count

    def count_step(self, num_items: Tensor | int, device: torch.device) -> None:
        """Count a training step, and whether it has target tokens; the mean loss is over the steps that have some.

        Args:
            num_items: number of target tokens in the global batch.
            device: the device of the counters.
        """
        has_targets = torch.as_tensor(num_items, device=device).reshape(()) > 0
        self._steps = self._steps.to(device) + torch.stack([torch.ones_like(has_targets), has_targets])

    def commit_step(self, is_applied: bool) -> None:
        """Add the sums of the current step to those since the last log, or discard them if the step is skipped."""
        sums, self._step_sums = self._step_sums, {}
        for name, value in sums.items() if is_applied else ():
            self._train_sums[name] = self._train_sums.get(name, 0.0) + value

    def take_train_sums(self, reduce: Callable[[Tensor, str], Tensor]) -> dict[str, float]:
        """Return the sums since the last log, over the steps of all ranks, and start new ones; empty if there are none.

        Args:
            reduce: `Accelerator.reduce`.
        """
        if not self._train_sums:
            return {}
        values = reduce(torch.stack(list(self._train_sums.values())).double(), "sum").tolist()
        sums = dict(zip(self._train_sums, values, strict=True))
        if not sums["target_tokens"]:
            logger.warning(f"Training found {_NO_TARGETS} since the last log, so its loss is NaN. {_CHECK_LABELS}")
        self._train_sums = {}
        return sums

    def take_loss_correction(self) -> float:
        """Return the factor that makes the logged loss a mean over the steps with target tokens since the last log."""
        factor = _correction_for_empty_steps(self._steps)
        self._logged_steps = self._logged_steps.to(self._steps.device) + self._steps
        self._steps = torch.zeros_like(self._steps)
        return factor

    def train_loss_correction(self) -> float:
        """Return the factor that makes `train_loss` a mean over the steps of the training with target tokens."""
        return _correction_for_empty_steps(self._logged_steps.to(self._steps.device) + self._steps)

    def start_evaluation(self) -> None:
        """Start the sums of an evaluation."""
        self._eval_sums, self._eval_rows = [], {}

    def add_evaluation_batch(
        self, step: StepOutput, gather: Callable[[Tensor], Tensor], model_type: ModelType | None = None
    ) -> None:
        """Add the sums of a batch over all ranks; does nothing outside of an evaluation.

        Sums are gathered row by row, because `gather` drops rows that were repeated to fill the last batch.

        Args:
            step: the output of the step.
            gather: `Accelerator.gather_for_metrics`.
            model_type: type of the student, whose output type may need values of each row.
        """
        if self._eval_sums is None:
            return
        rows = step.targets.batch_rows
        per_token = {**step.per_token, "target_tokens": torch.ones_like(rows, dtype=torch.float64)}
        table = torch.zeros(step.targets.shape[0], len(per_token), dtype=torch.float64, device=rows.device)
        for column, values in enumerate(per_token.values()):
            table[:, column].index_add_(0, rows, values.double())
        self._eval_names = list(per_token)
        row_values = {} if model_type is None else _row_values(step, model_type)
        table = gather(torch.cat([table, *(values.double() for values in row_values.values())], dim=1))
        sums, *gathered = table.split([len(per_token), *(values.shape[1] for values in row_values.values())], dim=1)
        self._eval_sums.append(sums.sum(0))
        for name, values in zip(row_values, gathered, strict=True):
            kept_values = (
                values.sum(0, keepdim=True) if model_type is None or model_type.output_type.sums_rows else values
            )
            self._eval_rows.setdefault(name, []).append(kept_values)

    def finish_evaluation(self, description: str) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Return the sums over all batches of the evaluation, and the `row_values` of its batches on the CPU.

        The sums are empty if no batch was added. The second has the sums of all batches or all rows by name, [N, n].

        Args:
            description: the name of the evaluation, for a warning that there are no target tokens.
        """
        batches, self._eval_sums = self._eval_sums, None
        row_values = {name: torch.cat(values).cpu() for name, values in self._eval_rows.items()}
        self._eval_rows = {}
        if not batches:
            return {}, {}
        sums = dict(zip(self._eval_names, torch.stack(batches).sum(0).tolist(), strict=True))
        if not sums["target_tokens"]:
            logger.warning(f"{description} found {_NO_TARGETS}, so its metrics are NaN. {_CHECK_LABELS}")
        return sums, row_values


def average_metrics(
    sums: dict[str, float], terms: Iterable[Term], sources: tuple[str, ...] = (), statistics: Iterable[str] = ()
) -> dict[str, float]:
    """Return the means of the terms and statistics over target tokens, under the names in the logs.

    Args:
        sums: sums over target tokens, with "target_tokens", their number, and "measured", the number of those
            that statistics were computed for.
        terms: the terms of the objective and of a teacher that is trained.
        sources: names of the sources of a data mixture.
        statistics: names of the statistics of the student's output type.
    """
    means = {name: mean_of(total, sums["target_tokens"]) for name, total in sums.items()}
    losses = {f"{term.name}_loss": means[term.name] for term in terms}
    losses |= {f"{name}_loss": means[name] for name in ("aux", "peer_aux") if name in means}
    num_measured = sums.get("measured", 0.0)
    names = [name for name in dict.fromkeys((*_STATISTICS, *statistics)) if name in sums and name not in _NOT_LOGGED]
    measured = {name: mean_of(sums[name], num_measured) for name in names}
    if EMBEDDING_SIMILARITY in means:
        measured["embedding_cosine"] = means[EMBEDDING_SIMILARITY]
    return losses | average_by_source(sums, sources) | measured | average_chunk_metrics(sums)


def _row_values(step: StepOutput, model_type: ModelType) -> dict[str, Tensor]:
    # The number of choices of a row may differ between batches.
    num_classes = step.num_outputs if model_type.has_classes and not model_type.vocabulary else None
    return model_type.output_type.row_values(step.per_token, step.targets, num_classes)


def evaluation_metrics(
    sums: dict[str, float],
    row_values: Mapping[str, Tensor],
    means: dict[str, float],
    terms: Iterable[Term],
    model_type: ModelType,
) -> dict[str, float]:
    """Return the means with `loss`, their weighted sum, and the metrics of the student's type that are defined.

    Args:
        sums: sums over target tokens.
        row_values: the second result of `finish_evaluation`.
        means: the result of `average_metrics`.
        terms: the terms of the objective.
        model_type: type of the student; language models have perplexities.
    """
    loss = sum(_weighted_mean(term, sums) for term in terms) + means.get("aux_loss", 0.0)
    metrics = {"loss": loss, **means}
    for name, cross_entropy in (("perplexity", "student_ce"), ("teacher_perplexity", "teacher_ce")):
        if model_type.vocabulary and cross_entropy in sums:
            metrics[name] = _exp(mean_of(sums[cross_entropy], sums["target_tokens"]))
    output_type = model_type.output_type
    rows = {name: values.sum(0) if output_type.sums_rows else values for name, values in row_values.items()}
    of_type = output_type.evaluation_metrics(sums, rows)
    return metrics | {name: value for name, value in of_type.items() if value is not None}


def _weighted_mean(term: Term, sums: Mapping[str, float]) -> float:
    """Return what a term contributes to the loss, whose weight may depend on the author of the tokens."""
    total = term.weight * sums[term.name]
    for origin, of_origin in term.by_origin.items():
        total += (of_origin.weight - term.weight) * sums[f"{term.name}@{origin_label(origin)}"]
    return mean_of(total, sums["target_tokens"])


def correct_greater_is_better(args: TrainingArguments) -> None:
    """Set `greater_is_better` to False for a metric of this package that plain `TrainingArguments` set to True."""
    metric = args.metric_for_best_model
    if isinstance(args, DistillArguments) or metric is None or not args.greater_is_better:
        return
    if greater_is_better(metric) is False:
        args.greater_is_better = False
        logger.warning(
            f"metric_for_best_model is {metric!r}, of which the smallest value is the best, so greater_is_better "
            "is set to False. Use a DistillConfig to set it yourself."
        )


def mean_of(total: float, count: float) -> float:
    """Return total / count; NaN for a count of 0."""
    return total / count if count else math.nan


def _correction_for_empty_steps(steps: Tensor) -> float:
    """Return the factor that turns a mean over all steps into one over the steps with target tokens.

    Args:
        steps: [2] numbers of all steps, and of steps with target tokens. Without any of the latter it is NaN.
    """
    count, with_targets = steps.tolist()
    return mean_of(count, with_targets) if count else 1.0


def _exp(nats: float) -> float:
    return math.inf if nats >= _MAX_EXP_NATS else math.exp(nats)
