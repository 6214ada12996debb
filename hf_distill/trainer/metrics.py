"""What a Trainer measures of its distillation: terms and statistics over asked tokens, in logs and in evaluation."""

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
_STATISTICS = ("kl", "agreement", "teacher_entropy", "student_entropy")  # at T = 1
_NO_TARGETS = "no target token (every label is -100)"
_CHECK_LABELS = "Check the labels: rows may be cut off before their targets begin."
TRAIN_STATISTICS_EVERY = 4  # in training they are taken on every fourth block of tokens, in evaluation on all


class MetricsMixin(_Base):
    """For any Trainer that has a `distiller`; nothing is measured of a step that is not collect_errors."""

    is_distilling: bool
    _total_loss_scalar: float
    _tr_loss: torch.Tensor
    distiller: Distiller
    teacher: Teacher
    sources: tuple[str, ...] = ()  # of a mixture, where no collator names them
    keep_logits = False  # somebody wants the logits of an evaluation

    def __init__(self, *args: Any, **kwargs: Any):
        self._train_sums: dict[str, torch.Tensor] = {}  # since the last log
        self._step_sums: dict[str, torch.Tensor] = {}  # of a step that is not taken yet
        self._steps = torch.zeros(2, dtype=torch.long)  # since the last log: all, and those with target tokens
        self._all_steps = torch.zeros(2, dtype=torch.long)  # of the training, up to the last log
        self._eval_rows: list[torch.Tensor] | None = None
        self._eval_names: list[str] = []
        super().__init__(*args, **kwargs)

    def _choose_direction(self) -> None:
        """Correct what `TrainingArguments` chose for a metric that it does not know; others say what they chose."""
        args, metric = self.args, self.args.metric_for_best_model
        if isinstance(args, DistillArguments) or metric is None or not args.greater_is_better:
            return
        if greater_is_better(metric) is False:
            args.greater_is_better = False
            logger.warning(
                f"metric_for_best_model is {metric!r}, of which the smallest value is the best: greater_is_better is "
                "set to False. Use a DistillConfig to choose it yourself."
            )

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; called again with a smaller batch after one that did not fit into memory."""
        self._train_sums, self._step_sums = {}, {}
        self._steps, self._all_steps = torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long)
        return super()._inner_training_loop(*args, **kwargs)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """As the Trainer's; counts steps without a target token, whose loss of 0 is no part of a mean."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.is_distilling and self.accelerator.sync_gradients and num_items_in_batch is not None:
            has_targets = torch.as_tensor(num_items_in_batch, device=loss.device).reshape(()) > 0
            self._steps = self._steps.to(loss.device) + torch.stack([torch.ones_like(has_targets), has_targets])
        return loss

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, whose `train_loss` is a mean over all steps."""
        if self.is_distilling and self.state.global_step > self._initial_global_step:
            factor = self._over_steps_with_targets(self._all_steps.to(self._steps.device) + self._steps)
            self._total_loss_scalar, self._tr_loss = self._total_loss_scalar * factor, self._tr_loss * factor
        return super()._finalize_training(*args, **kwargs)

    def _over_steps_with_targets(self, steps: torch.Tensor) -> float:
        """What a mean over all steps is multiplied by; NaN where none had a target token or none was taken."""
        count, with_targets = steps.tolist()
        return mean_of(count, with_targets) if count else 1.0

    def record_step(self, step: StepOutput, source: Any, training: bool) -> None:
        """Take a step's numbers, for the next log or the evaluation that runs.

        Args:
            step: the step; losses of each source are added to its `per_token`.
            source: of a mixture's batch, or None.
            training: whether the model trains.
        """
        step.per_token.update(split_by_source(step, source, self._sources))
        if training:
            self._add_train_sums(step)
        elif self._eval_rows is not None:
            self._eval_rows.append(self._row_sums(step))

    @property
    def _sources(self) -> tuple[str, ...]:
        return self.sources or getattr(self.data_collator, "sources", ())

    def _add_train_sums(self, step: StepOutput) -> None:
        for name, values in step.per_token.items():
            self._step_sums[name] = self._step_sums.get(name, 0.0) + values.sum()
        asked = torch.tensor(float(len(step.targets)), device=step.loss.device)
        self._step_sums["asked"] = self._step_sums.get("asked", 0.0) + asked

    def commit_step(self, taken: bool) -> None:
        """A step is over; the numbers of one that was skipped are forgotten."""
        sums, self._step_sums = self._step_sums, {}
        for name, value in sums.items() if taken else ():
            self._train_sums[name] = self._train_sums.get(name, 0.0) + value

    def _row_sums(self, step: StepOutput) -> torch.Tensor:
        """Sums of each batch row, so that rows repeated to fill the last distributed batch can be dropped."""
        rows = step.targets.rows
        per_token = {**step.per_token, "asked": torch.ones_like(rows, dtype=torch.float64)}
        table = torch.zeros(step.targets.shape[0], len(per_token), dtype=torch.float64, device=rows.device)
        for column, values in enumerate(per_token.values()):
            table[:, column].index_add_(0, rows, values.double())
        self._eval_names = list(per_token)
        return self.gather_function(table).sum(0)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As the Trainer's; the head runs on all positions only where somebody wants the logits."""
        self.keep_logits = not prediction_loss_only
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """As the Trainer's, and metrics over the asked tokens of the whole set; see `docs/metrics.md`."""
        self._eval_rows = []
        output = super().evaluation_loop(
            dataloader,
            description,
            prediction_loss_only=prediction_loss_only,
            ignore_keys=ignore_keys,
            metric_key_prefix=metric_key_prefix,
        )
        batches, self._eval_rows = self._eval_rows, None
        if batches:
            sums = dict(zip(self._eval_names, torch.stack(batches).sum(0).tolist(), strict=True))
            if not sums["asked"]:
                logger.warning(f"{description} found {_NO_TARGETS}, so that its metrics are NaN. {_CHECK_LABELS}")
            for name, value in self._eval_metrics(sums).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _average_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Terms and statistics, averaged over the asked tokens, under the names that users see."""
        mean = {name: mean_of(total, sums["asked"]) for name, total in sums.items()}
        learnt = [*self.distiller.terms, *self.teacher.terms]
        terms = {f"{term.name}_loss": mean[term.name] for term in learnt}
        terms |= {f"{name}_loss": mean[name] for name in ("aux", "peer_aux") if name in mean}
        measured = sums.get("measured", 0.0)
        statistics = {name: mean_of(sums[name], measured) for name in _STATISTICS if name in sums}
        return terms | average_by_source(sums, self._sources) | statistics

    def _eval_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        means = self._average_metrics(sums)
        loss = sum(t.weight * means[f"{t.name}_loss"] for t in self.distiller.terms) + means.get("aux_loss", 0.0)
        metrics = {"loss": loss, **means}
        if model_type_of(self.model).vocabulary:
            for name, of in (("perplexity", "student_ce"), ("teacher_perplexity", "teacher_ce")):
                if of in sums:
                    metrics[name] = _exp(mean_of(sums[of], sums["asked"]))
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; training logs also get terms and statistics, over the asked tokens since the last log."""
        if "loss" in logs and self._train_sums:
            values = self.accelerator.reduce(torch.stack(list(self._train_sums.values())).double(), "sum").tolist()
            sums = dict(zip(self._train_sums, values, strict=True))
            if not sums["asked"]:
                logger.warning(
                    f"Training found {_NO_TARGETS} since the last log, so that its loss is NaN. {_CHECK_LABELS}"
                )
            logs |= self._average_metrics(sums) | self.learned_layers()
            logs |= self.teacher.metrics()
            self._train_sums = {}
        if "loss" in logs and self.is_distilling:
            logs["loss"] *= self._over_steps_with_targets(self._steps)
            self._all_steps = self._all_steps.to(self._steps.device) + self._steps
            self._steps = torch.zeros_like(self._steps)
        super().log(logs, start_time)


def mean_of(total: float, count: float) -> float:
    """total / count; NaN of nothing."""
    return total / count if count else math.nan


def _exp(nats: float) -> float:
    return math.inf if nats >= 700 else math.exp(nats)
