"""Outputs that are distributions over ids or classes, for each token, row or pixel."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from ...core.loss_kinds import DISTRIBUTION
from ...core.targets import IGNORE_INDEX, Targets, target_labels
from ...errors import DistillError
from ..analytic_gradients import BlockLogits
from ..evaluation_metrics import (
    LABELED,
    PREDICTED,
    TRUE_POSITIVES,
    class_counts,
    macro_f1,
    mean_iou,
)
from ..token_metrics import PAIR_METRICS, STUDENT_METRICS, token_metrics
from .base import OutputType


class Distribution(OutputType):
    """One distribution over ids or classes for each target token."""

    outputs, soft_loss, hard_loss = DISTRIBUTION, "forward_kl", "cross_entropy"
    student_metrics: ClassVar[tuple[str, ...]] = STUDENT_METRICS
    pair_metrics: ClassVar[tuple[str, ...]] = PAIR_METRICS

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


class Classes(Distribution):
    """One distribution over classes for each token: accuracy and macro F1 of an evaluation."""

    student_metrics = (*STUDENT_METRICS, "prediction")
    pair_metrics = (*PAIR_METRICS, "teacher_accuracy", "teacher_prediction")
    evaluation_statistics = ("accuracy", "teacher_accuracy", "prediction", "teacher_prediction")

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that the labels are classes of the student."""
        targets.check_ids(num_outputs, is_vocabulary=False)

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each target; predictions are the most probable classes."""
        metrics = super().metrics(student, block, targets)
        logits = {"": student.student} | ({} if block is None else {"teacher_": block.teacher_full})
        for name, values in logits.items():
            prediction = values.argmax(-1)
            metrics[f"{name}accuracy"] = (prediction == targets.labels).to(values.dtype)
            metrics[f"{name}prediction"] = prediction.to(metrics["measured"].dtype)
        return metrics

    def row_values(
        self, statistics: Mapping[str, Tensor], targets: Targets, num_classes: int | None
    ) -> dict[str, Tensor]:
        """Return the counts of each class for macro F1; nothing if the number of classes depends on the batch."""
        tables: dict[str, Tensor] = {}
        for name in ("", "teacher_") if num_classes is not None else ():
            if (prediction := statistics.get(f"{name}prediction")) is not None:
                assert num_classes is not None
                args = (statistics["measured"], targets.batch_rows, targets.shape[0], num_classes)
                tables |= _with_prefix(class_counts(targets.labels, prediction, *args), name)
        return tables

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return accuracy and macro F1 of both models."""
        metrics: dict[str, float | None] = {}
        for name in ("", "teacher_"):
            if f"{name}accuracy" in sums and sums.get("measured"):
                metrics[f"{name}accuracy"] = sums[f"{name}accuracy"] / sums["measured"]
            if f"{name}{TRUE_POSITIVES}" in rows:
                metrics[f"{name}f1"] = macro_f1(_without_prefix(rows, name))
        return metrics


class RowClasses(Classes):
    """One distribution over classes for each row."""

    target = "row"


def _with_prefix(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _without_prefix(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: values[f"{prefix}{name}"] for name in (TRUE_POSITIVES, PREDICTED, LABELED)}


@dataclass(frozen=True)
class Pixels(Classes):
    """A distribution over classes for each pixel of an image: semantic segmentation.

    The logits are interpolated to the size of the labels, as transformers does for its loss. So teacher and student
    may have logits of different sizes, and both losses are those of the same pixels.

    ignore_index: label of the pixels that are no targets, from the config
    """

    ignore_index: int = 255

    target = "pixel"

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return the labels of the pixels, [B, H * W]; -100 for those that are ignored.

        Raises:
            DistillError: the labels are no maps of classes.
        """
        labels = target_labels(inputs, shift=False)
        if labels.dim() != 3 or labels.is_floating_point():
            raise DistillError(
                f"`labels` has dtype {labels.dtype} and shape {tuple(labels.shape)}, and semantic segmentation has "
                f"integer labels of shape [B, H, W], a class for each pixel and {self.ignore_index} for ignored ones."
            )
        labels = labels.flatten(1)
        return labels.masked_fill(labels == self.ignore_index, IGNORE_INDEX)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the pixels of a batch that are not ignored as targets."""
        labels = self.countable_labels(inputs, shift)
        height, width = inputs["labels"].shape[1:]
        return replace(Targets.from_batch({"labels": labels}, False, numbers), grid=(height, width))

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return accuracy and mean IoU of both models."""
        metrics = super().evaluation_metrics(sums, rows)
        for name in [name for name in ("", "teacher_") if metrics.pop(f"{name}f1", None) is not None]:
            metrics[f"{name}mean_iou"] = mean_iou(_without_prefix(rows, name))
        return metrics
