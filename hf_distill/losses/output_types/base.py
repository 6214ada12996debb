"""The base class of output types: what the outputs of a model are, and what follows from it."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from ...core.loss_kinds import BERNOULLIS, DISTRIBUTION, FRAMES, NO_LOGITS, OUTPUTS, REAL_VALUES, SPANS
from ...core.targets import Targets
from ..analytic_gradients import BlockLogits
from ..registry import LOSSES, Loss
from ..token_metrics import PAIR_METRICS, STUDENT_METRICS

OUTPUT_NAMES = {  # for messages
    DISTRIBUTION: "a distribution over ids or classes",
    BERNOULLIS: "independent labels",
    REAL_VALUES: "real values",
    SPANS: "spans of positions",
    FRAMES: "a distribution for each frame",
    NO_LOGITS: "embeddings",
}


class OutputType(ABC):
    """Base class of output types: describes the outputs of a model, and gives its losses, labels and metrics.

    The output type of a language model is a distribution over ids for each token, that of a regression model is one
    real number for each row. A derived class with a new name in `outputs` makes a new kind: losses are registered for
    it with `@loss(..., outputs=name)`. See `register_model_type`.

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
