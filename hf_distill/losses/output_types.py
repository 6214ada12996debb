"""Output types: what the outputs of a model are, and the losses, targets and metrics that follow from it.

A `ModelType` names its output type. Everything that depends on the type of the outputs is a method or an attribute of
the classes of this module.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..core.defaults import ALPHA
from ..core.loss_kinds import BERNOULLIS, DISTRIBUTION, EMBEDDING, FRAMES, NO_LOGITS, OUTPUTS, REAL_VALUES, SPANS
from ..core.targets import IGNORE_INDEX, Targets, real_labels, target_labels
from ..core.transcripts import MEAN, SUM, TranscriptLabels
from ..errors import DistillError
from .analytic_gradients import BlockLogits
from .bernoulli import BERNOULLI_COUNTS, BERNOULLI_PAIR_METRICS, BERNOULLI_STUDENT_METRICS, bernoulli_metrics
from .ctc import FRAME_PAIR_METRICS, FRAME_STUDENT_METRICS, frame_metrics
from .evaluation_metrics import (
    LABELED,
    PREDICTED,
    TRUE_POSITIVES,
    class_counts,
    macro_f1,
    mean_iou,
    micro_f1,
    pearson,
    spearman,
)
from .real_values import (
    REAL_VALUE_PAIR_METRICS,
    REAL_VALUE_PREDICTIONS,
    REAL_VALUE_STUDENT_METRICS,
    real_value_metrics,
)
from .registry import LOSSES, Loss
from .spans import (
    SPAN_HITS,
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
    FRAMES: "a distribution for each frame",
    NO_LOGITS: "embeddings",
}


class OutputType(ABC):
    """What the outputs of a model are, and the defaults that follow from it.

    A derived class with a new name in `outputs` makes a new kind: losses are registered for it with
    `@loss(..., outputs=name)`. See `register_model_type`.

    outputs:         one of `core.loss_kinds.OUTPUTS`, which the losses of the objective must fit
    soft_loss:       name of the default loss of the soft term
    hard_loss:       name of the loss of the hard term, that of the model itself; None: there are no labels
    student_metrics: names of the statistics of each target that read the student alone
    pair_metrics:    names of those that also read a teacher with logits
    label_names:     keys of a batch with the labels
    logit_names:     names of the outputs of a model of which the logits are made
    compares_positions: whether the outputs are distributions over the positions of the input tokens
    predicts_tokens:    whether the outputs are tokens and a blank, which have a tokenizer, and no perplexity
    target:          noun for a target, in units such as nats/token
    evaluation_statistics: names of statistics that only `evaluation_metrics` reads; their means are not logged
    sums_rows:       whether `row_values` are summed over the rows of an evaluation, or all of them are kept
    """

    outputs: ClassVar[str]
    soft_loss: ClassVar[str]
    hard_loss: ClassVar[str | None]
    student_metrics: ClassVar[tuple[str, ...]] = ()
    pair_metrics: ClassVar[tuple[str, ...]] = ()
    label_names: ClassVar[tuple[str, ...]] = ("labels",)
    logit_names: ClassVar[tuple[str, ...]] = ("logits",)
    compares_positions: ClassVar[bool] = False
    predicts_tokens: ClassVar[bool] = False
    target: ClassVar[str] = "token"
    evaluation_statistics: ClassVar[tuple[str, ...]] = ()
    sums_rows: ClassVar[bool] = True

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
        return [name for name, loss in LOSSES.items() if self.fits(loss) and loss.compares == ("logits",)]

    def fits(self, loss: Loss) -> bool:
        """Whether a loss is defined for models of this type."""
        return loss.fits(self.outputs)

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
            if not self.fits(loss)
        ]

    def different_settings(self, teacher: "OutputType") -> list[str]:
        """Return an error message for each setting of the outputs that a teacher of this type has to share."""
        return []

    def objective_problems(self, soft_loss: Loss, alpha: float) -> list[str]:
        """Return an error message for each part of the objective that is not defined for models of this type.

        Args:
            soft_loss: the loss of the soft term.
            alpha: the weight of the soft term in the arguments.
        """
        if soft_loss.feature is None:
            return []
        return [
            f"divergence is {soft_loss.name}, which compares embeddings, and the student predicts "
            f"{OUTPUT_NAMES[self.outputs]}: use {' or '.join(self.losses)}, and put this loss into `losses`"
        ]

    @property
    def kernel_computes_metrics(self) -> bool:
        """Whether the statistics are those of tokens, which the Triton kernel computes."""
        return {*self.student_metrics, *self.pair_metrics} <= {*STUDENT_METRICS, *PAIR_METRICS}

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

    def row_values(
        self, statistics: Mapping[str, Tensor], targets: Targets, num_classes: int | None
    ) -> dict[str, Tensor]:
        """Return what `evaluation_metrics` needs of each row of a batch, besides sums: name -> [B, n].

        Rows of all processes are gathered, without those that were repeated to fill the last batch. n is the same for
        all batches.

        Args:
            statistics: the result of `metrics` for all T targets of the batch, each [T].
            targets: the T targets.
            num_classes: number of outputs, if it is the same for all batches.
        """
        return {}

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return metrics of an evaluation that the means of the statistics do not show; None for an undefined one.

        Args:
            sums: sums of the statistics over all targets; "measured" is the number of targets.
            rows: the `row_values` of all rows in float64: their sums [n], or with `sums_rows` false all values [N, n].
        """
        return {}


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


class Spans(OutputType):
    """Two distributions over the positions of a row: where an answer starts, and where it ends."""

    outputs, soft_loss, hard_loss = SPANS, "span_kl", "span_cross_entropy"
    student_metrics, pair_metrics = SPAN_STUDENT_METRICS, SPAN_PAIR_METRICS
    label_names, logit_names = SPAN_LABELS, ("start_logits", "end_logits")
    compares_positions = True
    target = "position"
    evaluation_statistics = SPAN_HITS

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

    def row_values(
        self, statistics: Mapping[str, Tensor], targets: Targets, num_classes: int | None
    ) -> dict[str, Tensor]:
        """Return for each row whether both of its targets are hit, and whether it has both, [B, 1]."""
        rows, values = targets.batch_rows, {}
        for name in ("spans", *SPAN_HITS):
            hits = torch.ones_like(rows, dtype=torch.float64) if name == "spans" else statistics.get(name)
            if hits is not None:
                number = torch.zeros(targets.shape[0], dtype=torch.float64, device=rows.device)
                number.index_add_(0, rows, hits.double())
                values[name] = (number == len(SPAN_LABELS)).double()[:, None]
        return values

    def evaluation_metrics(self, sums: Mapping[str, float], rows: Mapping[str, Tensor]) -> dict[str, float | None]:
        """Return the share of rows for which a model predicts the start and the end, of those that have both."""
        names = dict(zip(SPAN_HITS, ("exact_match", "teacher_exact_match"), strict=True))
        if not float(rows["spans"]):
            return {}
        return {name: float(rows[hits] / rows["spans"]) for hits, name in names.items() if hits in rows}


def _with_prefix(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in values.items()}


def _without_prefix(values: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name: values[f"{prefix}{name}"] for name in (TRUE_POSITIVES, PREDICTED, LABELED)}


@dataclass(frozen=True)
class Frames(OutputType):
    """A distribution over tokens and a blank for each frame of a sound, trained with a CTC loss on transcripts.

    count_frames:  returns (number of valid frames of each row [B], number of frames of a padded row) of a batch, by the
                   model's own functions; None for a model that is not known yet
    blank:         id of the blank
    reduction:     `ctc_loss_reduction` of the config
    zero_infinity: `ctc_zero_infinity` of the config
    """

    count_frames: Callable[[Mapping[str, Tensor]], tuple[Tensor, int]] | None = None
    blank: int = 0
    reduction: str = SUM
    zero_infinity: bool = False

    outputs, soft_loss, hard_loss = FRAMES, "forward_kl", "ctc"
    student_metrics, pair_metrics = FRAME_STUDENT_METRICS, FRAME_PAIR_METRICS
    predicts_tokens = True
    target = "frame"
    _LABEL_RANGE: ClassVar[str] = "range of the transcripts"

    def __post_init__(self) -> None:
        if self.reduction not in (SUM, MEAN):
            raise DistillError(
                f"ctc_loss_reduction of the config is {self.reduction!r}: set it to {SUM!r} or {MEAN!r}, which weight "
                "the losses of the rows."
            )

    def fits(self, loss: Loss) -> bool:
        """Whether a loss is the CTC loss, or compares distributions, which each frame has."""
        return loss.fits(FRAMES) or (loss.fits(DISTRIBUTION) and "logits" in loss.compares)

    def different_settings(self, teacher: OutputType) -> list[str]:
        """Return an error message if the blank of the teacher is another token."""
        if not isinstance(teacher, Frames) or teacher.blank == self.blank:
            return []
        return [
            f"The blank of the teacher is the token {teacher.blank} and that of the student {self.blank}, so the same "
            "id means different tokens: use two models with the same tokenizer and pad_token_id"
        ]

    def countable_labels(self, inputs: dict, shift: bool) -> Tensor:
        """Return a zero for each valid frame, [B, F]; -100 for padding."""
        assert self.count_frames is not None, "only the type of a model counts frames"
        counts, num_frames = self.count_frames(inputs)
        is_padding = torch.arange(num_frames, device=counts.device) >= counts[:, None]
        return torch.zeros_like(is_padding, dtype=torch.long).masked_fill(is_padding, IGNORE_INDEX)

    def find_targets(self, inputs: dict, shift: bool, numbers: Mapping[str, Tensor]) -> Targets:
        """Return the valid frames of a batch as targets.

        Raises:
            DistillError: the batch has no labels, or labels that are not ids.
        """
        transcripts, frames = target_labels(inputs, shift=False), self.countable_labels(inputs, shift)
        if transcripts.is_floating_point() or transcripts.dim() != 2:
            raise DistillError(
                f"`labels` has dtype {transcripts.dtype} and shape {tuple(transcripts.shape)}, and the labels of a CTC "
                "model are the ids of transcripts [B, U], padded with -100."
            )
        ids = transcripts.masked_fill(transcripts == IGNORE_INDEX, 0)
        label_range = torch.stack(ids.aminmax()) if ids.numel() else ids.new_zeros(2)
        targets = Targets.from_batch({"labels": frames}, False, {**numbers, self._LABEL_RANGE: label_range})
        labels = TranscriptLabels(transcripts, self.blank, self.reduction, self.zero_infinity)
        return replace(targets, transcripts=labels, documents=(frames != IGNORE_INDEX).long())

    def check_labels(self, targets: Targets, num_outputs: int) -> None:
        """Check that the transcripts are ids of the student.

        Raises:
            DistillError: one is negative, or at least V.
        """
        smallest, largest = targets.numbers[self._LABEL_RANGE]
        if smallest < 0 or largest >= num_outputs:
            raise DistillError(
                f"`labels` has the id {smallest if smallest < 0 else largest}, and the student predicts {num_outputs} "
                "tokens: make the labels with the student's tokenizer, and pad them with -100."
            )

    def metrics(self, student: BlockLogits, block: BlockLogits | None, targets: Targets) -> dict[str, Tensor]:
        """Return the statistics of each frame."""
        return frame_metrics(student, block)


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


DISTRIBUTION_OUTPUTS, BERNOULLI_OUTPUTS = Distribution(), Bernoullis()
CLASS_OUTPUTS, ROW_CLASS_OUTPUTS = Classes(), RowClasses()
REAL_VALUE_OUTPUTS, SPAN_OUTPUTS = RealValues(), Spans()
FRAME_OUTPUTS, PIXEL_OUTPUTS = Frames(), Pixels()
EMBEDDING_OUTPUTS = Embeddings()
