"""What a Trainer measures of its distillation: terms and statistics over asked tokens, in logs and in evaluation."""

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from .by_source import of_sources, source_means
from .distiller import Distiller, Step
from .tasks import task_of
from .teachers import Teacher

_Base: Any = Trainer if TYPE_CHECKING else object
_STATISTICS = ("kl", "agreement", "teacher_entropy", "student_entropy")  # at T = 1
EVERY = 4  # in training they are taken on every fourth block of tokens, in evaluation on all


class MetricsMixin(_Base):
    """For any Trainer that has a `distiller`; nothing is measured of a step that is not noted."""

    distiller: Distiller
    teacher: Teacher
    sources: tuple[str, ...] = ()  # of a mixture, where no collator names them
    keep_logits = False  # somebody wants the logits of an evaluation

    def __init__(self, *args: Any, **kwargs: Any):
        self._train_sums: dict[str, torch.Tensor] = {}  # since the last log
        self._step_sums: dict[str, torch.Tensor] = {}  # of a step that is not taken yet
        self._eval_rows: list[torch.Tensor] | None = None
        self._eval_names: list[str] = []
        super().__init__(*args, **kwargs)

    def note(self, step: Step, source: Any, training: bool) -> None:
        """Take a step's numbers, for the next log or the evaluation that runs.

        Args:
            step: the step; losses of each source are added to its `per_token`.
            source: of a mixture's batch, or None.
            training: whether the model trains.
        """
        step.per_token.update(of_sources(step, source, self._sources))
        if training:
            self._add_train_sums(step)
        elif self._eval_rows is not None:
            self._eval_rows.append(self._row_sums(step))

    @property
    def _sources(self) -> tuple[str, ...]:
        return self.sources or getattr(self.data_collator, "sources", ())

    def _add_train_sums(self, step: Step) -> None:
        for name, values in step.per_token.items():
            self._step_sums[name] = self._step_sums.get(name, 0.0) + values.sum()
        asked = torch.tensor(float(len(step.targets)), device=step.loss.device)
        self._step_sums["asked"] = self._step_sums.get("asked", 0.0) + asked

    def settle(self, taken: bool) -> None:
        """A step is over; the numbers of one that was skipped are forgotten."""
        sums, self._step_sums = self._step_sums, {}
        for name, value in sums.items() if taken else ():
            self._train_sums[name] = self._train_sums.get(name, 0.0) + value

    def _row_sums(self, step: Step) -> torch.Tensor:
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
            for name, value in self._eval_metrics(sums).items():
                output.metrics[f"{metric_key_prefix}_{name}"] = value
        return output

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        """Terms and statistics, averaged over the asked tokens, under the names that users see."""
        mean = {name: total / max(sums["asked"], 1.0) for name, total in sums.items()}
        learnt = [*self.distiller.terms, *self.teacher.terms]
        terms = {f"{term.name}_loss": mean[term.name] for term in learnt}
        terms |= {f"{name}_loss": mean[name] for name in ("aux", "peer_aux") if name in mean}
        measured = max(sums.get("measured", 0.0), 1.0)
        statistics = {name: sums[name] / measured for name in _STATISTICS if name in sums}
        return terms | source_means(sums, self._sources) | statistics

    def _eval_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        means = self._means(sums)
        loss = sum(t.weight * means[f"{t.name}_loss"] for t in self.distiller.terms) + means.get("aux_loss", 0.0)
        metrics = {"loss": loss, **means}
        if task_of(self.model).vocabulary:
            for name, of in (("perplexity", "student_ce"), ("teacher_perplexity", "teacher_ce")):
                if of in sums:
                    metrics[name] = _exp(sums[of] / max(sums["asked"], 1.0))
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; training logs also get terms and statistics, over the asked tokens since the last log."""
        if "loss" in logs and self._train_sums:
            sums = self.accelerator.reduce(torch.stack(list(self._train_sums.values())).double(), "sum").tolist()
            logs |= self._means(dict(zip(self._train_sums, sums, strict=True))) | self.learned_layers()
            logs |= self.teacher.metrics()
            self._train_sums = {}
        super().log(logs, start_time)


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
