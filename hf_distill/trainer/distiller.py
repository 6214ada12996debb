"""The step: one batch in, one loss out. A plain object that runs without a Trainer."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..core.logits import DenseLogits, LazyLogits, named_sources
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from ..losses.fused import ChunkedLoss
from ..losses.objective import Term
from ..models.features import FeatureLoss, Features
from ..models.forward import StepLosses, forward_with_loss
from ..models.model_call import without_foreign_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..teachers import Teacher


@dataclass(frozen=True)
class StepOutput:
    """What a step found.

    loss:      [] the objective, sum over asked tokens / num_items, with its graph
    per_token: name -> [T], detached: each term ("soft", "hard", ...) as `scale * loss`, and statistics if asked for;
               "aux": the sum of the auxiliary losses that the model's own forward adds, where it adds any
    targets:   the asked tokens
    outputs:   the student's outputs
    """

    loss: Tensor
    per_token: dict[str, Tensor]
    targets: Targets
    outputs: Any


class Distiller:
    """The objective applied to batches.

    L = sum over asked tokens of sum(weight * T^2 * loss) / num_items, with the terms of `objective`

    Args:
        terms: see `objective`.
        chunk_tokens: asked tokens a chunk of the fused head; None: what a workspace of 150 MiB holds.
        features: the terms on features, matched to student and teacher; the student wears their sidecar.

    look: called with each batch's job, the source of the student's logits, what the teacher says and the asked tokens,
        before the job is run.
    """

    pre_loss_hook: Callable[[ChunkedLoss, LazyLogits | DenseLogits, Signals, Targets], None] | None = None

    def __init__(self, terms: list[Term], chunk_tokens: int | None = None, features: Features | None = None):
        self.terms, self.chunk_tokens = terms, chunk_tokens
        self.features = Features() if features is None else features
        self._on_logits = [term for term in terms if not term.loss.feature]

    def __call__(
        self,
        student: nn.Module,
        teacher: Teacher,
        inputs: dict,
        num_items: Tensor | int | None = None,
        keep_logits: bool = False,
        statistics: int = 0,
    ) -> StepOutput:
        """One forward of both models and their loss.

        Args:
            student: the model as prepared (DDP and other wrappers included).
            teacher: a prepared teacher.
            inputs: the collator's batch with `labels`.
            num_items: asked tokens of the whole global batch; None: those of this batch.
            keep_logits: keep the student's logits of all positions in `outputs`.
            statistics: also `kl` (T = 1), `agreement`, entropies and cross entropies of both models, for every so
                manieth block of tokens (0: none, 1: all); see `HeadJob`.

        Raises:
            DistillError: labels missing, not ids, or outside the student's vocabulary; a classifier whose teacher
                predicts another number of classes.
        """
        model = unwrap_model(student)
        task = model_type_of(model)
        targets = Targets.from_batch(inputs, task.shifts_labels)
        size = task.num_outputs(model)
        targets.check_ids(size)
        tokens = self.features.tokens(inputs, targets)
        feature_requests = self.features.feature_requests(tokens)
        joint_step = teacher.joint_step(inputs, targets, feature_requests, num_items)
        told = Signals(None) if joint_step else teacher(inputs, targets, feature_requests)
        asked = targets
        inputs, targets = teacher.transform_student_batch(inputs, targets, model.training)
        tokens = tokens if targets is asked else self.features.tokens(inputs, targets)

        def jobs(said: LazyLogits | DenseLogits) -> StepLosses:
            if said.vocab_size < size:  # a config can promise more classes than there are logits
                targets.check_ids(said.vocab_size)
            own = None if joint_step is None else joint_step(said)
            heard = told if joint_step is None else joint_step.teacher_signals
            if not task.vocabulary:
                _check_class_counts(heard, said)
            head = ChunkedLoss(heard.logits, targets, self._on_logits, statistics, self.chunk_tokens, num_items)
            if self.pre_loss_hook is not None:
                self.pre_loss_hook(head, said, heard, asked)
            return StepLosses(head, FeatureLoss(self.features.terms, heard.features, tokens, targets, num_items), own)

        feature_keys = self.features.said(tokens)
        with joint_step.context(student) if joint_step else nullcontext():
            inputs = without_foreign_inputs(model, inputs, teacher.input_names())
            loss, outputs, done = forward_with_loss(student, inputs, targets, feature_keys, jobs, keep_logits)
        found = done.head.per_token | done.features.per_token | (joint_step.per_token if joint_step else {})
        return StepOutput(loss, found, asked, outputs)


def _check_class_counts(teacher: Signals, student: LazyLogits | DenseLogits) -> None:
    """Refuse two classifiers whose logits are of different numbers of classes, whatever their configs promise.

    Language models may pad one vocabulary to different sizes; classes have no padding.

    Raises:
        DistillError: the numbers differ.
    """
    for name, source in named_sources(teacher.logits).items():
        if source.vocab_size not in (None, student.vocab_size):
            called = "The teacher" if name is None else f"Teacher {name!r}"
            raise DistillError(
                f"{called} returns logits of {source.vocab_size} classes and the student of {student.vocab_size}: "
                "nothing says which of them correspond. Use a teacher and a student whose logits are of the same "
                "classes, in the same order."
            )
