"""Outputs of which every row is a target: independent labels, real values, and embeddings without labels."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core.defaults import ALPHA
from ...core.loss_kinds import BERNOULLIS, EMBEDDING, NO_LOGITS, REAL_VALUES
from ...core.targets import Targets, real_labels, target_labels
from ...errors import DistillError
from ..analytic_gradients import BlockLogits
from ..bernoulli import BERNOULLI_COUNTS, BERNOULLI_PAIR_METRICS, BERNOULLI_STUDENT_METRICS, bernoulli_metrics
from ..evaluation_metrics import (
    LABELED,
    PREDICTED,
    TRUE_POSITIVES,
    micro_f1,
    pearson,
    spearman,
)
from ..real_values import (
    REAL_VALUE_PAIR_METRICS,
    REAL_VALUE_PREDICTIONS,
    REAL_VALUE_STUDENT_METRICS,
    real_value_metrics,
)
from ..registry import LOSSES, Loss
from .base import OutputType


class RowOutputs(OutputType):
    """Outputs of which every row of a batch is a target: `row_labels` returns the labels, by default real numbers."""

    target = "row"

    def row_labels(self, inputs: dict) -> Tensor:
        """Return the labels of a batch, [B, ...], with one entry for each row."""
        return real_labels(inputs)

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return a zero for each row, [B]."""
        labels = inputs.get(self.label_names[0])
        labels = target_labels(inputs, shift=False) if labels is None else labels
        return torch.zeros(len(labels), dtype=torch.long, device=labels.device)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return one target for each row of a batch."""
        return Targets.of_rows(self.row_labels(inputs), numbers)


class Bernoullis(RowOutputs):
    """An independent Bernoulli for each label of a row: multi-label classification."""

    outputs, soft_loss, hard_loss = BERNOULLIS, "bernoulli_kl", "binary_cross_entropy"
    student_metrics, pair_metrics = BERNOULLI_STUDENT_METRICS, BERNOULLI_PAIR_METRICS
    evaluation_statistics = BERNOULLI_COUNTS
    _INVALID_LABELS: ClassVar[str] = "labels that are no probabilities"

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return one target for each row of a batch, and count the labels that are no probabilities."""
        labels = self.row_labels(inputs)
        num_invalid = ((labels < 0) | (labels > 1)).sum().reshape(1)
        return Targets.of_rows(labels, {**numbers, self._INVALID_LABELS: num_invalid})

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that each row has a number for each label, between 0 and 1.

        Raises:
            DistillError: the labels have another shape or other values.
        """
        if (num_invalid := targets.numbers[self._INVALID_LABELS][0]) > 0:
            raise DistillError(
                f"{num_invalid} of the labels of this batch are below 0 or above 1, and those of a multi-label "
                "classifier are 1.0 for each label that applies and 0.0 for the others, or probabilities. Unknown "
                "labels (-100 or -1) are not ignored: replace them, or leave their rows out."
            )
        if targets.labels.shape[1:] != (num_outputs,):
            raise DistillError(
                f"`labels` has shape {tuple(targets.labels.shape)}, and the student predicts {num_outputs} labels for "
                f"each row: give labels of shape ({len(targets)}, {num_outputs}), 1.0 for each label that applies."
            )

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each row."""
        return bernoulli_metrics(student, block, targets.labels)

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return the micro F1 of both models, where a label is predicted if its probability is above 0.5."""
        return {
            f"{name}f1": micro_f1(sums[f"{name}{TRUE_POSITIVES}"], sums[f"{name}{PREDICTED}"], sums[LABELED])
            for name in ("", "teacher_")
            if f"{name}{PREDICTED}" in sums
        }


class RealValues(RowOutputs):
    """Real numbers for each row: regression, and rerankers with one score."""

    outputs, soft_loss, hard_loss = REAL_VALUES, "mse", "squared_error"
    student_metrics, pair_metrics = REAL_VALUE_STUDENT_METRICS, REAL_VALUE_PAIR_METRICS
    evaluation_statistics = REAL_VALUE_PREDICTIONS
    sums_rows = False

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that each row has a number for each output.

        Raises:
            DistillError: the labels have another shape.
        """
        if targets.labels.numel() != len(targets) * num_outputs:
            raise DistillError(
                f"`labels` has shape {tuple(targets.labels.shape)}, and the student predicts {num_outputs} numbers for "
                f"each row: give labels of shape ({len(targets)}, {num_outputs})."
            )

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each row."""
        return real_value_metrics(student, block)

    def row_values(
        self, statistics: Mapping[str, Tensor], targets: Targets, num_classes: int | None
    ) -> dict[str, Tensor]:
        """Return the label and the outputs of each row, [B, 1]; nothing if a row has several outputs."""
        if num_classes != 1 or targets.labels.numel() != targets.shape[0]:
            return {}
        series = {"label": targets.labels, **{name: statistics.get(name) for name in REAL_VALUE_PREDICTIONS}}
        return {name: values.reshape(-1, 1) for name, values in series.items() if values is not None}

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return the correlations of both models with the labels, and with each other."""
        pairs = {
            "": ("prediction", "label"),
            "teacher_": ("teacher_prediction", "label"),
            "agreement_": ("prediction", "teacher_prediction"),
        }
        return {
            f"{prefix}{measure.__name__}": measure(rows[x][:, 0], rows[y][:, 0])
            for prefix, (x, y) in pairs.items()
            if x in rows and y in rows
            for measure in (pearson, spearman)
        }


class Embeddings(RowOutputs):
    """Hidden states and no logits: an encoder without a head, which is trained on rows without labels.

    The soft loss is one on embeddings, with the weight 1, and there is no hard loss. In place of logits there is one
    number without a gradient for each row, [B, 1], which no loss reads.
    """

    outputs, soft_loss, hard_loss = NO_LOGITS, "embedding_cosine", None
    label_names, logit_names = (), ("last_hidden_state",)

    @property
    def losses(self) -> list[str]:
        """Names of the losses on embeddings."""
        return [name for name, loss in LOSSES.items() if loss.feature == EMBEDDING]

    def objective_problems(self, soft_loss: Loss, alpha: float) -> list[str]:
        """Return an error message if alpha gives a weight to labels, or the soft loss compares no embeddings."""
        problems = []
        if alpha not in (ALPHA, 1.0):
            problems.append(
                f"alpha is {alpha}, and an encoder has no labels that could have the weight 1 - alpha: leave alpha "
                "out, or set it to 1"
            )
        if soft_loss.feature is None and self.fits(soft_loss):
            problems.append(f"divergence is {soft_loss.name}: use {' or '.join(self.losses)}")
        return problems

    def logits_of(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Return one number without a meaning for each row, [B, 1]; None without hidden states."""
        hidden = outputs.get("last_hidden_state")
        return hidden.new_zeros(len(hidden), 1) if isinstance(hidden, Tensor) else None

    def row_labels(self, inputs: dict) -> Tensor:
        """Return a zero for each row, [B]."""
        return self.countable_labels(inputs, shift=False)

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return a zero for each row, [B].

        Raises:
            DistillError: the batch has no inputs.
        """
        values = inputs.get("input_ids", next((v for v in inputs.values() if isinstance(v, Tensor) and v.dim()), None))
        if values is None:
            raise DistillError(f"The batch has no inputs of a model; it has {sorted(inputs)}.")
        return torch.zeros(len(values), dtype=torch.long, device=values.device)
