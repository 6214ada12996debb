"""Output types: what the outputs of a model are, and the losses, targets and metrics that follow from it.

A `ModelType` names its output type. Everything that depends on the type of the outputs is a method or an attribute of
the classes of this module.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.loss_kinds import BERNOULLIS, DISTRIBUTION, OUTPUTS, REAL_VALUES, SPANS
from ..core.targets import Targets, real_labels, target_labels
from ..errors import DistillError
from .analytic_gradients import BlockLogits
from .bernoulli import BERNOULLI_PAIR_METRICS, BERNOULLI_STUDENT_METRICS, bernoulli_metrics
from .real_values import REAL_VALUE_PAIR_METRICS, REAL_VALUE_STUDENT_METRICS, real_value_metrics
from .registry import LOSSES, Loss
from .spans import (
    SPAN_LABELS,
    SPAN_PAIR_METRICS,
    SPAN_STUDENT_METRICS,
    allowed_positions,
    span_labels,
    span_metrics,
)
from .token_metrics import PAIR_METRICS, STUDENT_METRICS, token_metrics

OUTPUT_NAMES = {  # for messages
    DISTRIBUTION: "a distribution over ids or classes",
    BERNOULLIS: "independent labels",
    REAL_VALUES: "real values",
    SPANS: "spans of positions",
}


class OutputType(ABC):
    """What the outputs of a model are, and the defaults that follow from it.

    A derived class with a new name in `outputs` makes a new kind: losses are registered for it with
    `@loss(..., outputs=name)`. See `register_model_type`.

    outputs:         one of `core.loss_kinds.OUTPUTS`, which the losses of the objective must fit
    soft_loss:       name of the default loss of the soft term
    hard_loss:       name of the loss of the hard term, that of the model itself
    student_metrics: names of the statistics of each target that read the student alone
    pair_metrics:    names of those that also read a teacher with logits
    label_names:     keys of a batch with the labels
    logit_names:     names of the outputs of a model of which the logits are made
    compares_positions: whether the outputs are distributions over the positions of the input tokens
    """

    outputs: ClassVar[str]
    soft_loss: ClassVar[str]
    hard_loss: ClassVar[str]
    student_metrics: ClassVar[tuple[str, ...]] = ()
    pair_metrics: ClassVar[tuple[str, ...]] = ()
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    logit_names: ClassVar[tuple[str, ...]] = ("logits",)
    compares_positions: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        """Add the kind of outputs of a derived class to those that losses can be registered for."""
        if (kind := getattr(cls, "outputs", None)) is not None and kind not in OUTPUTS:
            OUTPUTS.append(kind)
            OUTPUT_NAMES[kind] = f"outputs of the kind {kind!r}"

    def __deepcopy__(self, memo: dict) -> "OutputType":
        """Return the object itself: a copy of a model keeps its type."""
        return self

    @property
    def losses(self) -> list[str]:
        """Names of the losses on logits that fit models of this type."""
        return [name for name, loss in LOSSES.items() if loss.outputs == self.outputs and loss.compares == ("logits",)]

    @property
    def has_temperature(self) -> bool:
        """Whether the soft losses of this type have a temperature."""
        return "temperature" in LOSSES[self.soft_loss].options

    def unfitting_losses(self, losses: Iterable[Loss]) -> list[str]:
        """Return an error message for each loss that is not defined for models of this type."""
        return [
            f"The loss {loss.name} is for {OUTPUT_NAMES[loss.outputs]}, and the student predicts "
            f"{OUTPUT_NAMES[self.outputs]}: use {' or '.join(self.losses)}"
            for loss in losses
            if not loss.fits(self.outputs)
        ]

    def logits_of(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Return the logits of a model, with the positions of the targets first; None if the outputs have none.

        Args:
            outputs: the outputs of the model by name.
        """
        return outputs.get("logits")

    @abstractmethod
    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return a tensor with one number for each position that may be a target; -100 marks those that are none."""

    @abstractmethod
    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the targets of a batch; see `Targets.from_batch`."""

    def check_labels(self, targets: Targets, num_outputs: int) -> None:  # noqa: B027  # by default all labels fit
        """Check the labels against V, the number of outputs of the student."""

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each target of a block by name, each [r]; see `token_metrics`.

        Args:
            student: `student.student` are the student logits [r, V].
            block: `block.student` and `block.teacher` are those of both models; None: there is no teacher with logits.
            targets: the r targets.
        """
        return {}


class Distribution(OutputType):
    """One distribution over ids or classes for each target token."""

    outputs, soft_loss, hard_loss = DISTRIBUTION, "forward_kl", "cross_entropy"
    student_metrics, pair_metrics = STUDENT_METRICS, PAIR_METRICS

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return the labels, shifted if the model shifts them."""
        return target_labels(inputs, shift)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the target tokens of a batch."""
        return Targets.from_batch(inputs, shift, numbers)

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that the labels are ids of the student."""
        targets.check_ids(num_outputs)

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each target token."""
        return token_metrics(student, block)


class RowOutputs(OutputType):
    """Outputs of which every row of a batch is a target: `row_labels` returns the labels, by default real numbers."""

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

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that each row has a number for each label.

        Raises:
            DistillError: the labels have another shape.
        """
        if targets.labels.shape[1:] != (num_outputs,):
            raise DistillError(
                f"`labels` has shape {tuple(targets.labels.shape)}, and the student predicts {num_outputs} labels for "
                f"each row: give labels of shape ({len(targets)}, {num_outputs}), 1.0 for each label that applies."
            )

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each row."""
        return bernoulli_metrics(student, block)


class RealValues(RowOutputs):
    """Real numbers for each row: regression, and rerankers with one score."""

    outputs, soft_loss, hard_loss = REAL_VALUES, "mse", "squared_error"
    student_metrics, pair_metrics = REAL_VALUE_STUDENT_METRICS, REAL_VALUE_PAIR_METRICS

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


class Spans(OutputType):
    """Two distributions over the positions of a row: where an answer starts, and where it ends."""

    outputs, soft_loss, hard_loss = SPANS, "span_kl", "span_cross_entropy"
    student_metrics, pair_metrics = SPAN_STUDENT_METRICS, SPAN_PAIR_METRICS
    label_names, logit_names = SPAN_LABELS, ("start_logits", "end_logits")
    compares_positions = True

    def logits_of(self, outputs: Mapping[str, Any]) -> Tensor | None:
        """Stack the logits of starts and ends [B, S] to [B, 2, S]; `logits` are used if the outputs have them."""
        parts = [part for name in self.logit_names if isinstance(part := outputs.get(name), Tensor)]
        if "logits" in outputs or len(parts) < len(self.logit_names):
            return outputs.get("logits")
        return torch.stack(parts, dim=1)

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return the positions of starts and ends, [B, 2]."""
        return span_labels(inputs)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the starts and ends of a batch as targets, [2 * B] without those outside of their row."""
        targets = Targets.from_batch({"labels": span_labels(inputs)}, False, numbers)
        return replace(targets, allowed=allowed_positions(inputs)[targets.batch_rows])

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each start and end."""
        return span_metrics(student, block, targets)


DISTRIBUTION_OUTPUTS, BERNOULLI_OUTPUTS = Distribution(), Bernoullis()
REAL_VALUE_OUTPUTS, SPAN_OUTPUTS = RealValues(), Spans()
