"""One distillation step: `Distiller` takes a batch and returns its loss. It runs with or without a Trainer."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.logits import DenseLogits, LazyLogits
from ..core.row_values import ORIGIN
from ..core.signals import Signals
from ..core.targets import Targets
from ..core.teacher_logits import RoutedLogits, logits_by_teacher
from ..errors import DistillError, RunError
from ..losses.fused import ChunkedLoss
from ..losses.objective import Term
from ..losses.routed import loss_on_logits
from ..models.features import FeatureLoss, Features
from ..models.forward import forward_with_loss
from ..models.model_call import without_foreign_inputs
from ..models.model_types import model_type_of, unwrap_model
from ..models.precision import teacher_autocast
from ..teachers import MultiTeacher, MultiViewTeacher, Teacher, TrainableTeacher
from ..teachers.base import JointStep
from ..teachers.compatibility import check_images_are_read
from ..teachers.group import teachers_by_name
from ..teachers.input_keys import other_size_problem
from ..teachers.input_limits import check_ids
from .step_inputs import StepInputs


@dataclass(frozen=True)
class StepOutput:
    """Result of one distillation step.

    loss:      [] the sum over target tokens / num_items, with its autograd graph
    per_token: name -> [T], detached: each term ("soft", "hard", ...) as `T^2 * loss`, and the statistics if they were
               requested; "aux" holds the sum of the auxiliary losses that the model's forward adds, if it adds any
    targets:   the T target tokens at their positions in the batch that the teacher reads
    outputs:   the outputs of the student's forward; their `logits` are a placeholder that carries the loss, [1, 1, 1],
               unless logits were materialized (`keep_logits`, or an output head that requires it)
    num_outputs: V, the number of ids, classes or values that the student predicts for each target
    """

    loss: Tensor
    per_token: dict[str, Tensor]
    targets: Targets
    outputs: Any
    num_outputs: int | None = None


class Distiller:
    """Compute the distillation loss of a batch.

    loss = sum over target tokens of w * (sum over terms of weight * T^2 * term) / num_items

    w is the weight of the token's row, if the batch has `weight` ([B], or [B, S] of each token), else 1. It does not
    change num_items. With `by_origin` in the arguments, the batch has `origin`, the index of the author in `ORIGINS`.

    A call runs these steps:

    1. `StepInputs.read` finds the target tokens (labels != -100) from the `shift_labels` that the Trainer leaves in
       the batch; without a Trainer it shifts the labels. What a target is depends on the student's output type
       (`losses/output_types/`): for a multi-label classifier it is a row.
    2. The teacher returns its signals for the target tokens: logits and the requested features, without gradient. It
       reads `teacher_<name>` as `<name>` if the batch has such keys (`core/teacher_inputs.py`): what its processor
       makes of an image, audio or a text, or another prompt before the same target tokens. A `CrossTokenizerTeacher`
       reads the text in its tokens.
       A teacher that is trained together with the student returns a `JointStep` instead, which runs in step 4.
       With mixed precision the teacher runs under the autocast of the student.
    3. A `MultiViewTeacher` may replace the student's view of the batch; the target tokens stay the same.
    4. The student's forward runs once. `ChunkedLoss` runs in place of its output head and computes the terms on
       logits and their gradients chunk by chunk, so full logits are never materialized.
    5. At the end of that forward, `FeatureLoss` computes the terms on hidden states and attention.

    Args:
        terms: the terms of the objective; see `objective`.
        chunk_tokens: target tokens in one chunk of the fused loss; None chooses as many as fit into 150 MiB
            on a CPU, or into about 1 GiB on a GPU.
        features: the terms on features, matched to student and teacher. The student must have their sidecar attached.
        teacher_terms: the terms of a teacher that is trained with the student.
        autocast_dtype: dtype of the student's mixed precision, if accelerate wraps its forward with autocast; None: the
            teacher runs under the autocast that is enabled around the call, if any.

    Attributes:
        pre_loss_hook: called before the loss of each batch is computed, with the chunked loss, the student's logits,
            the teacher's signals, and the target tokens; None calls nothing.
        agree_on_failure: called before the student runs, with the error of a teacher that failed, or None; it raises on
            all ranks if a teacher failed on one. None: the error is raised on this rank only.
    """

    agree_on_failure: Callable[[RunError | None], None] | None = None
    pre_loss_hook: Callable[[ChunkedLoss, LazyLogits | DenseLogits, Signals, Targets], None] | None = None

    def __init__(
        self,
        terms: list[Term],
        chunk_tokens: int | None = None,
        features: Features | None = None,
        teacher_terms: Sequence[Term] = (),
        autocast_dtype: torch.dtype | None = None,
    ):
        self.autocast_dtype = autocast_dtype
        self.terms, self.chunk_tokens, self.teacher_terms = terms, chunk_tokens, teacher_terms
        self.features = Features() if features is None else features
        self._logit_terms = [term for term in terms if not term.loss.feature]

    def __call__(
        self,
        student: nn.Module,
        teacher: Teacher,
        inputs: dict,
        num_items: Tensor | int | None = None,
        keep_logits: bool = False,
        statistics_every: int = 0,
    ) -> StepOutput:
        """Run one forward of both models and compute the loss.

        Args:
            student: the model as prepared for training, with wrappers such as DDP.
            teacher: a prepared teacher.
            inputs: the batch of the collator, with `labels`.
            num_items: number of target tokens in the global batch; None uses those of this batch.
            keep_logits: whether to keep the student's logits of all positions in `outputs`.
            statistics_every: also compute the metrics `kl` (at T = 1), `agreement`, and the entropies and cross
                entropies of both models, of every n-th target token (0 disables, 1 is every token).

        Raises:
            DistillError: labels are missing, do not fit the outputs of the student, or are outside its vocabulary; or
                a classifier's teacher predicts another number of classes.
        """
        model = unwrap_model(student)
        model_type = model_type_of(model)
        num_outputs, output_type = model_type.num_outputs(model), model_type.output_type
        counts_origins = any(term.by_origin for term in self.terms)
        step = StepInputs.read(inputs, teacher, self.features, model_type, counts_origins)
        if num_outputs is not None:
            output_type.check_labels(step.targets, num_outputs)
        if model_type.is_decoder:
            _check_images(step, model, teacher)
        with _explained_errors(teacher, model, step):
            joint_step, teacher_signals = self._run_teacher(teacher, step, num_items)
        view = self._student_view(teacher, step, model.training)
        chunked_loss = loss_on_logits(
            teacher_signals.logits,
            view.targets,
            self._logit_terms,
            statistics_every,
            self.chunk_tokens,
            num_items,
            output_type,
        )
        feature_loss = FeatureLoss(
            self.features.terms, teacher_signals.features, view.feature_tokens, view.targets, num_items
        )
        num_logits = num_outputs

        def before_loss(student_logits: LazyLogits | DenseLogits) -> Tensor | None:
            """Run a jointly trained teacher and check the logits; called in the student's forward, before the loss."""
            # A config can declare more classes than there are logits, and a module declares none.
            if num_outputs is None or student_logits.vocab_size < num_outputs:
                output_type.check_labels(view.targets, student_logits.vocab_size)
            nonlocal num_logits
            num_logits, teacher_loss, signals = student_logits.vocab_size, None, teacher_signals
            if joint_step is not None:
                teacher_loss = joint_step(student_logits)
                signals = joint_step.teacher_signals
                assert not isinstance(signals.logits, RoutedLogits)  # no teacher of single rows is trained
                chunked_loss.teacher_logits, feature_loss.teacher_features = signals.logits, signals.features
            if not model_type.vocabulary:
                _check_class_counts(signals, student_logits)
            if self.pre_loss_hook is not None:
                self.pre_loss_hook(chunked_loss, student_logits, signals, step.targets)
            return teacher_loss

        student_inputs = without_foreign_inputs(model, view.inputs, teacher.input_names())
        student_requests = self.features.student_requests(view.feature_tokens)
        with joint_step.context(student) if joint_step else nullcontext():
            loss, outputs = forward_with_loss(
                student, student_inputs, chunked_loss, feature_loss, student_requests, before_loss, keep_logits
            )
        per_token = chunked_loss.per_token | feature_loss.per_token
        if joint_step:
            per_token |= joint_step.per_token
        return StepOutput(loss, per_token, step.targets, outputs, num_logits)

    def _run_teacher(
        self, teacher: Teacher, step: StepInputs, num_items: Tensor | int | None
    ) -> tuple[JointStep | None, Signals]:
        """Return the step of a teacher that is trained with the student, or the signals of any other one.

        Raises:
            RunError: the teacher failed, on this rank or on another one.
        """
        joint_step, signals, failure = None, Signals(None), None
        inputs, targets, requests = step.teacher_inputs, step.teacher_targets, step.feature_requests
        try:
            with teacher_autocast(targets.labels.device, self.autocast_dtype):
                if isinstance(teacher, TrainableTeacher | MultiTeacher):
                    joint_step = teacher.joint_step(inputs, targets, requests, num_items, self.teacher_terms)
                if joint_step is None:
                    signals = teacher(inputs, targets, requests)
        except RunError as error:
            if self.agree_on_failure is None:
                raise
            failure = error
        if self.agree_on_failure is not None:
            self.agree_on_failure(failure)
        return joint_step, signals

    def _student_view(self, teacher: Teacher, step: StepInputs, is_training: bool) -> StepInputs:
        """Return the step with the view of the batch that a `MultiViewTeacher` gives the student, if there is one."""
        inputs, targets = step.inputs, step.targets
        for each in teachers_by_name(teacher).values():
            if isinstance(each, MultiViewTeacher):
                inputs, targets = each.transform_student_batch(inputs, targets, is_training)
        if targets is step.targets:
            return replace(step, inputs=inputs)
        targets = replace(targets, **_row_values(step.targets))
        return replace(step, inputs=inputs, targets=targets, feature_tokens=self.features.tokens(inputs, targets))


@contextmanager
def _explained_errors(teacher: Teacher, student: nn.Module, step: StepInputs) -> Iterator[None]:
    """Replace errors of a teacher's model that come from the batch by errors that name the input.

    Raises:
        DistillError: an id is outside the teacher's embeddings, or images or audio have a size that it cannot read.
    """
    try:
        yield
    except (DistillError, RunError):
        raise
    except IndexError:
        if step.teacher_inputs.get("input_ids") is not step.inputs.get("input_ids"):
            for each in teachers_by_name(teacher).values():
                if isinstance(each.model, nn.Module):
                    check_ids(each.model, step.teacher_inputs, "teacher")
        raise
    except (ValueError, RuntimeError) as error:  # of a model of transformers
        if problem := other_size_problem(teacher, student, step.inputs, step.teacher_inputs):
            raise DistillError(problem) from error
        raise


def _row_values(targets: Targets) -> dict[str, Any]:
    """Return what does not depend on the positions of the target tokens, for the same tokens in another view."""
    numbers = {name: counts for name, counts in targets.numbers.items() if name == ORIGIN}
    return {"weights": targets.weights, "origins": targets.origins} | ({"numbers": numbers} if numbers else {})


def _check_images(step: StepInputs, student: nn.Module, teacher: Teacher) -> None:
    """Check that student and teachers read the images of a batch; see `check_images_are_read`."""
    check_images_are_read(step.inputs, student, "student")
    members = teacher.teachers.items() if isinstance(teacher, MultiTeacher) else [(None, teacher)]
    for name, one in members:
        check_images_are_read(step.teacher_inputs, one, "teacher" if name is None else f"teacher {name!r}")


def _check_class_counts(teacher_signals: Signals, student_logits: LazyLogits | DenseLogits) -> None:
    """Check that two classifiers return logits of the same number of classes, whatever their configs declare.

    Language models may pad one vocabulary to different sizes; classes have no padding.

    Raises:
        DistillError: the numbers of classes differ.
    """
    for name, logits in logits_by_teacher(teacher_signals.logits).items():
        if logits.vocab_size not in (None, student_logits.vocab_size):
            subject = "The teacher" if name is None else f"The teacher {name!r}"
            raise DistillError(
                f"{subject} returns logits of {logits.vocab_size} classes and the student of "
                f"{student_logits.vocab_size}, so their classes cannot be matched. Use a teacher and a student whose "
                "logits are of the same classes, in the same order."
            )
