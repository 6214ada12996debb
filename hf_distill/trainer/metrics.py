"""`MetricsMixin`: the metrics of a distillation in training logs and evaluation, averaged over target tokens."""

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.utils import logging

from ..losses.token_metrics import greater_is_better
from ..models.model_types import model_type_of
from ..teachers import Teacher
from .config import DistillArguments
from .distiller import Distiller, StepOutput
from .source_metrics import average_by_source, split_by_source

logger = logging.get_logger(__name__)
_Base: Any = Trainer if TYPE_CHECKING else object
_STATISTICS = ("kl", "agreement", "teacher_entropy", "student_entropy")  # computed at temperature 1
_NO_TARGETS = "no target token (every label is -100)"
_CHECK_LABELS = "Check the labels: rows may be truncated before their targets begin."
TRAIN_STATISTICS_EVERY = 4  # training computes the statistics on every fourth block of tokens, evaluation on all
_MAX_EXP_NATS = 700  # exp of more overflows a float


class MetricsMixin(_Base):
    """Sums the metrics of the steps, and adds their means to the logs; skipped steps are not counted."""

    is_distilling: bool
    _total_loss_scalar: float
    _tr_loss: torch.Tensor
    distiller: Distiller
    teacher: Teacher
    sources: tuple[str, ...] = ()  # names of the sources of a mixture, if the collator has none
    keep_logits = False  # whether the running evaluation returns logits

    def __init__(self, *args: Any, **kwargs: Any):
        self._reset_train_metrics()
        self._eval_sums: list[torch.Tensor] | None = None  # sums of each batch of the running evaluation
        self._eval_names: list[str] = []
        super().__init__(*args, **kwargs)

    def _reset_train_metrics(self) -> None:
        self._train_sums: dict[str, torch.Tensor] = {}  # sums over target tokens since the last log
        self._step_sums: dict[str, torch.Tensor] = {}  # sums of the current step
        # Numbers of steps, and of steps with target tokens: since the last log, and in the training before it.
        self._steps = torch.zeros(2, dtype=torch.long)
        self._logged_steps = torch.zeros(2, dtype=torch.long)

    def _choose_direction(self) -> None:
        """Set `greater_is_better` to False for a metric of this package that plain `TrainingArguments` set to True."""
        args, metric = self.args, self.args.metric_for_best_model
        if isinstance(args, DistillArguments) or metric is None or not args.greater_is_better:
            return
        if greater_is_better(metric) is False:
            args.greater_is_better = False
            logger.warning(
                f"metric_for_best_model is {metric!r}, of which the smallest value is the best, so greater_is_better "
                "is set to False. Use a DistillConfig to set it yourself."
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Start with empty sums; `auto_find_batch_size` calls this again after a batch did not fit into memory."""
        self._reset_train_metrics()
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Run the Trainer's step, and count the steps with target tokens, over which the mean loss is taken."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_distilling and self.accelerator.sync_gradients and num_items_in_batch is not None:
            has_targets = torch.as_tensor(num_items_in_batch, device=loss.device).reshape(()) > 0
            self._steps = self._steps.to(loss.device) + torch.stack([torch.ones_like(has_targets), has_targets])
        return loss

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """Make `train_loss` the mean over the steps that have target tokens."""
        if self.is_distilling and self.state.global_step > self._initial_global_step:
            factor = self._correction_for_empty_steps(self._logged_steps.to(self._steps.device) + self._steps)
            self._total_loss_scalar, self._tr_loss = self._total_loss_scalar * factor, self._tr_loss * factor
        return super()._finalize_training(*args, **kwargs)

    def _correction_for_empty_steps(self, steps: torch.Tensor) -> float:
        """Return the factor that turns a mean over all steps into one over the steps with target tokens.

        Args:
            steps: [2] numbers of all steps, and of steps with target tokens. Without any of the latter it is NaN.
        """
        count, with_targets = steps.tolist()
        return mean_of(count, with_targets) if count else 1.0

    def record_step(self, step: StepOutput, source: Any, training: bool) -> None:
        """Add the values of a step to the sums for the next log, or for the running evaluation.

        Args:
            step: the output of the step; this method adds the losses of each source to its `per_token`.
            source: [B, S] index of the source of each token, or None.
            training: whether this is a training step.
        """
        step.per_token.update(split_by_source(step, source, self._sources))
        if training:
            self._add_train_sums(step)
        elif self._eval_sums is not None:
            self._eval_sums.append(self._sum_over_rows(step))

    @property
    def _sources(self) -> tuple[str, ...]:
        return self.sources or getattr(self.data_collator, "sources", ())

    def _add_train_sums(self, step: StepOutput) -> None:
        for name, values in step.per_token.items():
            self._step_sums[name] = self._step_sums.get(name, 0.0) + values.sum()
        count = torch.tensor(float(len(step.targets)), device=step.loss.device)
        self._step_sums["target_tokens"] = self._step_sums.get("target_tokens", 0.0) + count

    def commit_step(self, applied: bool) -> None:
        """Add the sums of the current step to those since the last log; discard them if the step is skipped.

        Args:
            applied: whether the optimizer applies the step.
        """
        sums, self._step_sums = self._step_sums, {}
        for name, value in sums.items() if applied else ():
            self._train_sums[name] = self._train_sums.get(name, 0.0) + value

    def _sum_over_rows(self, step: StepOutput) -> torch.Tensor:
        """Return the sum of each metric over the batches of all ranks.

        Sums are gathered row by row, because `gather_function` drops rows that were repeated to fill the last batch.
        """
        rows = step.targets.rows
        per_token = {**step.per_token, "target_tokens": torch.ones_like(rows, dtype=torch.float64)}
        table = torch.zeros(step.targets.shape[0], len(per_token), dtype=torch.float64, device=rows.device)
        for column, values in enumerate(per_token.values()):
            table[:, column].index_add_(0, rows, values.double())
        self._eval_names = list(per_token)
        return self.gather_function(table).sum(0)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Run the Trainer's evaluation step; logits of all positions are materialized only if it returns them."""
        self.keep_logits = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Run the Trainer's evaluation, and add metrics over all target tokens of the data; see `docs/metrics.md`."""
        self._eval_sums = []
        output = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        batches, self._eval_sums = self._eval_sums, None
        if batches:
            sums = dict(zip(self._eval_names, torch.stack(batches).sum(0).tolist(), strict=True))
            if not sums["target_tokens"]:
                logger.warning(f"{description} found {_NO_TARGETS}, so its metrics are NaN. {_CHECK_LABELS}")
            for name, value in self._eval_metrics(sums).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _average_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the means of the terms and statistics over target tokens, under the names in the logs.

        Args:
            sums: sums over target tokens, with "target_tokens", their number, and "measured", the number of those
                that statistics were computed for.
        """
        means = {name: mean_of(total, sums["target_tokens"]) for name, total in sums.items()}
        losses = {f"{term.name}_loss": means[term.name] for term in (*self.distiller.terms, *self.teacher.terms)}
        losses |= {f"{name}_loss": means[name] for name in ("aux", "peer_aux") if name in means}
        num_measured = sums.get("measured", 0.0)
        statistics = {name: mean_of(sums[name], num_measured) for name in _STATISTICS if name in sums}
        return losses | average_by_source(sums, self._sources) | statistics

    def _eval_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Return the means, with `loss`, their weighted sum, and for language models the perplexities."""
        means = self._average_metrics(sums)
        terms = self.distiller.terms
        loss = sum(term.weight * means[f"{term.name}_loss"] for term in terms) + means.get("aux_loss", 0.0)
        metrics = {"loss": loss, **means}
        if model_type_of(self.model).vocabulary:
            for name, cross_entropy in (("perplexity", "student_ce"), ("teacher_perplexity", "teacher_ce")):
                if cross_entropy in sums:
                    metrics[name] = _exp(mean_of(sums[cross_entropy], sums["target_tokens"]))
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as the Trainer does; training logs get the means over the target tokens since the last log, too."""
        if "loss" in logs and self._train_sums:
            values = self.accelerator.reduce(torch.stack(list(self._train_sums.values())).double(), "sum").tolist()
            sums = dict(zip(self._train_sums, values, strict=True))
            if not sums["target_tokens"]:
                logger.warning(f"Training found {_NO_TARGETS} since the last log, so its loss is NaN. {_CHECK_LABELS}")
            logs |= self._average_metrics(sums) | self.learned_layers()
            logs |= self.teacher.metrics()
            self._train_sums = {}
        if "loss" in logs and self.is_distilling:
            logs["loss"] *= self._correction_for_empty_steps(self._steps)
            self._logged_steps = self._logged_steps.to(self._steps.device) + self._steps
            self._steps = torch.zeros_like(self._steps)
        super().log(logs, start_time)


def mean_of(total: float, count: float) -> float:
    """Return total / count; NaN for a count of 0."""
    return total / count if count else math.nan


def _exp(nats: float) -> float:
    return math.inf if nats >= _MAX_EXP_NATS else math.exp(nats)
