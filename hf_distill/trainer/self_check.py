"""`SelfCheck`: compares the loss and gradient of the first batch with an unfused reference.

On 32 target tokens, the losses, the total and the gradient of the fused loss must equal those of a plain reference:
materialized logits, the definitions of the losses, autograd, and the weights and T^2 from the arguments. In addition,
the losses from lazy logits must equal those from the logits that the unmodified forwards of the models return.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.aligned_logits import AlignedLogits, aligned_only, cut_rows
from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs, compute_dtype, take_rows
from ..core.signals import Signals
from ..core.targets import IGNORE_INDEX, Targets, target_labels
from ..core.teacher_logits import MultiTeacherLogits, OneTeacherLogits, logits_by_teacher
from ..errors import RunError
from ..losses.fused import ChunkedLoss
from ..losses.logit_chunks import LogitSource
from ..losses.objective import Term
from ..losses.output_types import OutputType
from ..losses.routed import GroupedLoss
from ..models.image_inputs import without_placeholder_labels
from ..models.model_types import model_type_of
from ..models.output_head import LogitSample, forget_output_head, known_output_head
from ..teachers import FrozenTeacher, Teacher
from ..teachers.input_limits import check_ids
from .config import DistillArguments

NUM_TOKENS = 32  # target tokens that are compared with the reference
_RELATIVE_TOLERANCE = 1e-2  # of the largest value: TF32 and bf16 differ by thousandths, a wrong objective by more
_TOLERANCE_NATS = 1e-4  # float32 error, before T^2, where the two distributions are equal and their logits cancel
_MAX_ROUNDINGS = 64  # float32 roundings of a logit by which a gradient may differ, where its parts cancel
_TILE_ROWS = 4096  # vocabulary rows of the output head that are converted to float32 at a time


@dataclass(frozen=True)
class SelfCheck:
    """A `Distiller.pre_loss_hook` that checks the objective on the first batch.

    distill_args: the arguments that define the objective
    inputs:       the batch of the collator
    shift:        whether the logits at position i predict the label at i + 1
    output_type:  what the outputs of the student are
    student, teacher: the models whose unmodified logits are compared too; None compares none
    """

    distill_args: DistillArguments
    inputs: dict
    shift: bool
    output_type: OutputType
    student: nn.Module | None = None
    teacher: nn.Module | None = None

    @classmethod
    def prepare(
        cls, distill_args: DistillArguments, inputs: dict[str, Tensor], student: nn.Module, teacher: Teacher
    ) -> "SelfCheck":
        """Return a check for a batch; the next forward of each model measures its output head again.

        Args:
            distill_args: the arguments that define the objective.
            inputs: the batch of the collator.
            student: the student.
            teacher: the teacher; the unmodified logits of a frozen model are compared too.

        Raises:
            DistillError: the batch has ids outside the student's embeddings.
        """
        teacher_model = teacher.model if isinstance(teacher, FrozenTeacher) else None
        for model in (student, teacher_model):
            if model is not None:
                forget_output_head(model)
        check_ids(student, inputs)
        model_type = model_type_of(student)
        inputs = without_placeholder_labels(inputs, model_type.placeholders)
        return cls(distill_args, inputs, model_type.shifts_labels, model_type.output_type, student, teacher_model)

    def __call__(
        self,
        chunked_loss: ChunkedLoss,
        student_logits: LazyLogits | DenseLogits,
        teacher_signals: Signals,
        targets: Targets,
    ) -> None:
        """Compare the fused loss of this batch with the reference.

        Args:
            chunked_loss: the fused loss, before it runs.
            student_logits: the student's logits.
            teacher_signals: the teacher's logits and features.
            targets: the target tokens of the batch.

        Raises:
            RunError: they differ; the message says in what.
        """
        problems = [*self._check_target_count(targets), *_check_no_grad(teacher_signals)]
        if isinstance(chunked_loss, GroupedLoss):
            for loss, logits in chunked_loss.parts_of(student_logits):
                problems += self._check_fused_loss(*_sample_tokens(loss, logits)) if len(loss.targets) else []
        elif len(chunked_loss.targets):
            problems += self._check_fused_loss(*_sample_tokens(chunked_loss, student_logits))
            problems += self._check_unmodified_logits(chunked_loss, student_logits)
        if problems:
            raise RunError(
                f"The self-check of the first batch failed: {'; '.join(problems)}. Training would not optimize the "
                "objective of the arguments. A custom loss that reads other tokens or draws random numbers also fails "
                "the check; self_check=False (--no-self-check) turns it off."
            )

    def _check_target_count(self, targets: Targets) -> list[str]:
        """Compare the number of target tokens with a count from the labels of the batch."""
        if self.shift and self._has_labels_of_collator():
            is_target = self.inputs["shift_labels"] != IGNORE_INDEX
        else:
            labels, mask = self.output_type.countable_labels(self.inputs, False), self.inputs.get("attention_mask")
            is_target = labels != IGNORE_INDEX
            if self.shift:
                is_target = is_target[..., 1:]
                if mask is not None and mask.shape == labels.shape:
                    is_target = is_target & (mask[..., :-1] != 0)  # padding predicts no token
        count = int(is_target.sum())
        if count == len(targets):
            return []
        return [f"the step has {len(targets)} target tokens, but the labels have {count}"]

    def _has_labels_of_collator(self) -> bool:
        """Whether `shift_labels` are the collator's, and not the labels that the trainer shifted."""
        if (shift_labels := self.inputs.get("shift_labels")) is None or "labels" not in self.inputs:
            return shift_labels is not None
        return not torch.equal(shift_labels, target_labels(self.inputs | {"shift_labels": None}, shift=True))

    def _check_fused_loss(self, chunked_loss: ChunkedLoss, student_logits: LazyLogits | DenseLogits) -> list[str]:
        """Compare the terms, the total and the gradient of the fused loss with the reference."""
        values: Tensor = student_logits.hidden if isinstance(student_logits, LazyLogits) else student_logits.values
        with torch.enable_grad(), torch.autocast(values.device.type, enabled=False):
            leaf = values.detach().requires_grad_()
            if isinstance(student_logits, LazyLogits):
                total = chunked_loss.from_hidden(replace(student_logits, hidden=leaf))
            else:
                total = chunked_loss.from_logits(DenseLogits(leaf))
            (gradient,) = torch.autograd.grad(total, leaf)
            expected_terms, expected_gradient = self._reference(chunked_loss, _materialize(student_logits))
        problems = []
        for term in chunked_loss.terms:
            fused, plain = chunked_loss.per_token[term.name], expected_terms[term.name]
            if not _allclose(fused, plain, _TOLERANCE_NATS * self._scale(term)):
                problems.append(
                    f"{term.name} is {fused.mean():.6g} in the fused loss and {plain.mean():.6g} by its definition"
                )
        count = len(chunked_loss.targets)
        weights = {term.name: self._weight(term) for term in chunked_loss.terms}
        expected = sum(weight * expected_terms[name].sum() for name, weight in weights.items()) / count
        total_scale = sum(abs(self._weight(term)) * self._scale(term) for term in chunked_loss.terms)
        if not _allclose(total.detach(), torch.as_tensor(expected), _TOLERANCE_NATS * max(total_scale, 1)):
            listed = ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
            problems.append(f"the loss is {total:.6g}, but {expected:.6g} with the weights of the arguments ({listed})")
        rounding = _gradient_rounding(student_logits) * total_scale / count
        if isinstance(student_logits, LazyLogits):
            expected_gradient = _hidden_gradient(expected_gradient, student_logits)
        if not _allclose(gradient, expected_gradient, 1e-6 + rounding):
            problems.append("the gradient of the fused loss is not the gradient of its definition")
        return problems

    @torch.no_grad()
    def _check_unmodified_logits(
        self, chunked_loss: ChunkedLoss, student_logits: LazyLogits | DenseLogits
    ) -> list[str]:
        """Compare the losses from lazy logits with those from the logits that the models themselves returned."""
        student = _logit_sample(self.student) if isinstance(student_logits, LazyLogits) else None
        if student is None or not isinstance(student_logits, LazyLogits):
            return []
        teacher = _logit_sample(self.teacher) if isinstance(chunked_loss.teacher_logits, LazyLogits) else None
        samples = [student] if teacher is None else [student, teacher]
        count = min(len(chunked_loss.targets), *(len(sample.logits) for sample in samples))
        by_teacher = chunked_loss.logits_by_teacher(NUM_TOKENS)
        count -= count % chunked_loss.rows_together
        if not count:  # a loss reads more targets together than the sample has
            return []
        rows, device = slice(count), student_logits.hidden.device
        if chunks := aligned_only(by_teacher):
            rows = cut_rows(len(chunked_loss.targets), count, chunks)[0]
            if rows.stop > count:  # the first chunk is longer than the sample
                return []
        teacher_logits = _slice_teachers(by_teacher, rows)
        teachers = {name: _dense_signals(_slice(logits, rows)) for name, logits in by_teacher.items()}
        if teacher is not None and isinstance(chunked_loss.teacher_logits, LazyLogits):
            hidden = teacher.hidden[rows].to(chunked_loss.teacher_logits.hidden)
            teacher_logits = replace(chunked_loss.teacher_logits, hidden=hidden)
            teachers = {None: Signals(DenseLogits(teacher.logits[rows].to(device)))}
        sampled_loss = replace(
            chunked_loss,
            teacher_logits=teacher_logits,
            targets=chunked_loss.targets.slice(rows),
            statistics_every=0,
            chunk_tokens=None,
            num_items=None,
            per_token={},
        )
        sampled_loss.from_hidden(
            replace(student_logits.detach(), hidden=student.hidden[rows].to(student_logits.hidden))
        )
        unmodified = Signals(DenseLogits(student.logits[rows].to(device)))
        largest = max(float(s.logits.where(s.logits.isfinite(), 0).abs().max()) for s in samples)
        rounding = 4 * max(sample.eps for sample in samples) * largest
        problems = []
        for term in sampled_loss.terms:
            scale = self._scale(term)
            plain = _term_values(term, unmodified, teachers, sampled_loss.targets) * scale
            fused = sampled_loss.per_token[term.name]
            if not _allclose(fused, plain, (_TOLERANCE_NATS + rounding) * scale):
                problems.append(
                    f"{term.name} is {fused.mean():.6g} in the fused loss and {plain.mean():.6g} "
                    "from the logits that the unmodified models return"
                )
        return problems

    def _weight(self, term: Term) -> float:
        """Return the weight of a term: that of the arguments for "soft" and "hard", else that of the term."""
        alpha = self._of_origin(term).get("alpha", self.distill_args.alpha)
        return {"soft": alpha, "hard": 1 - alpha}.get(term.name, term.weight)

    def _of_origin(self, term: Term) -> dict[str, Any]:
        """Return the arguments of `by_origin` that the term has."""
        by_origin = cast("dict[str, dict]", self.distill_args.by_origin or {})
        return by_origin[term.origin] if term.origin else {}

    def _scale(self, term: Term) -> float:
        """Return T^2, with the temperature of the arguments for "soft"; 1 for a term without a temperature."""
        if "temperature" not in term.options:
            return 1.0
        if term.name != "soft":
            return term.options["temperature"] ** 2
        soft_loss = self._of_origin(term).get("divergence", self.distill_args.soft_loss)
        temperature = soft_loss.get("temperature") if isinstance(soft_loss, dict) else None
        return (self.distill_args.loss_temperature if temperature is None else temperature) ** 2

    def _reference(
        self, chunked_loss: ChunkedLoss, materialized: tuple[Tensor, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Compute the objective with materialized logits and autograd.

        Args:
            chunked_loss: holds the terms, the targets and the teacher's logits.
            materialized: the result of `_materialize`.

        Returns:
            the values of each term, [n], and the gradient of their weighted mean by the output of the head, [n, V].
        """
        head_output, logits = materialized
        by_teacher = chunked_loss.logits_by_teacher(NUM_TOKENS)
        teachers = {name: _dense_signals(source) for name, source in by_teacher.items()}
        values, total = {}, head_output.new_zeros(())
        for term in chunked_loss.terms:
            losses = _term_values(term, Signals(DenseLogits(logits)), teachers, chunked_loss.targets)
            values[term.name] = losses.detach() * self._scale(term)
            if self._weight(term):
                total = total + self._weight(term) * self._scale(term) * losses.sum() / len(chunked_loss.targets)
        if not total.requires_grad:
            return values, torch.zeros_like(head_output)
        return values, torch.autograd.grad(total, head_output)[0]


def _term_values(term: Term, student: Signals, teachers: dict, targets: Targets) -> Tensor:
    """Return the unscaled losses of a term by its definition, [n]; 0 for tokens without a label, times the weights."""
    values = term.loss.function(student, teachers.get(term.teacher), targets, **term.options)
    for factor in (None if term.loss.compares else targets.label_mask, targets.weights):
        values = values if factor is None else values * factor
    return values


def _sample_tokens(
    chunked_loss: ChunkedLoss, student_logits: LazyLogits | DenseLogits
) -> tuple[ChunkedLoss, LazyLogits | DenseLogits]:
    """Return the loss and the logits of about 32 target tokens of the batch, to be computed in two chunks."""
    num_tokens, teachers = len(chunked_loss.targets), chunked_loss.logits_by_teacher(NUM_TOKENS)
    if chunks := aligned_only(teachers):  # whole chunks of the first tokens
        rows = cut_rows(num_tokens, NUM_TOKENS, chunks)[0]
    else:
        # Losses that compare targets with each other read consecutive ones, or all of them.
        step = max(1, num_tokens // NUM_TOKENS) if chunked_loss.rows_together == 1 else 1
        end = num_tokens if chunked_loss.rows_together > num_tokens else step * NUM_TOKENS
        rows = slice(0, end, step)
    sampled_loss = replace(
        chunked_loss,
        teacher_logits=_slice_teachers(teachers, rows),
        targets=chunked_loss.targets.slice(rows),
        statistics_every=0,
        chunk_tokens=NUM_TOKENS // 2,
        num_items=None,
        per_token={},
    )
    return sampled_loss, take_rows(student_logits.detach(), rows)


def _logit_sample(model: nn.Module | None) -> LogitSample | None:
    """Return the logits of an unmodified forward of the model, if `output_head` measured one."""
    head = None if model is None else known_output_head(model)
    return None if head is None else head.sample


def _slice_teachers(
    teachers: Mapping[str | None, LogitSource], rows: slice
) -> OneTeacherLogits | MultiTeacherLogits | None:
    """Return the teachers' logits of some target tokens; those of a single teacher have the name None."""
    sliced = {name: _slice(source, rows) for name, source in teachers.items()}
    if None in sliced or not sliced:
        return sliced.get(None)
    return MultiTeacherLogits({str(name): source for name, source in sliced.items()})


def _slice(source: LogitSource, rows: slice) -> LogitSource:
    """Return the detached logits of some target tokens."""
    if isinstance(source, SparseLogProbs | AlignedLogits):
        return source.slice(rows)
    return take_rows(source.detach(), rows)


def _materialize(student_logits: LazyLogits | DenseLogits) -> tuple[Tensor, Tensor]:
    """Return the output of the head, [n, V], as an autograd leaf, and the logits that the scaling makes of it."""
    if isinstance(student_logits, DenseLogits):
        leaf = student_logits.values.detach().to(compute_dtype(student_logits.values)).requires_grad_()
        return leaf, leaf
    dtype = compute_dtype(student_logits.hidden, student_logits.weight)
    hidden = student_logits.hidden.to(dtype)
    with torch.no_grad():
        tiles = student_logits.weight.split(_TILE_ROWS)
        head_output = torch.cat([hidden @ tile.to(dtype).t() for tile in tiles], dim=1)
        if student_logits.bias is not None:
            head_output += student_logits.bias
    logits = head_output.requires_grad_() * student_logits.scaling.scale
    softcap = student_logits.scaling.softcap
    return head_output, logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _hidden_gradient(gradient: Tensor, student_logits: LazyLogits) -> Tensor:
    """Return the gradient by the hidden states, [n, H], for a gradient by the output of the head, [n, V]."""
    tiles = zip(gradient.split(_TILE_ROWS, dim=1), student_logits.weight.split(_TILE_ROWS), strict=True)
    return torch.stack([part @ tile.to(part.dtype) for part, tile in tiles]).sum(0)


def _gradient_rounding(student_logits: LazyLogits | DenseLogits) -> float:
    """Return the absolute error that float32 rounding of the logits may cause in the gradient of one token."""
    logits = student_logits.project() if isinstance(student_logits, LazyLogits) else student_logits.values
    finite = logits.masked_fill(~logits.isfinite(), 0)
    rounding = _MAX_ROUNDINGS * torch.finfo(torch.float32).eps * float(finite.abs().max())
    if isinstance(student_logits, LazyLogits):
        largest_weight = max(float(tile.abs().max()) for tile in student_logits.weight.split(_TILE_ROWS))
        rounding *= largest_weight * abs(student_logits.scaling.scale)
    return rounding


def _dense_signals(source: LogitSource) -> Signals:
    """Return a teacher's signals with materialized logits."""
    if isinstance(source, AlignedLogits):
        if isinstance(source.first_logits, LazyLogits):
            source = replace(source, first_logits=DenseLogits(source.first_logits.project()))
        return Signals(source)
    return Signals(source if isinstance(source, SparseLogProbs) else DenseLogits(source.project()))


def _check_no_grad(teacher_signals: Signals) -> list[str]:
    """Check that the teacher's signals have no autograd graph, through which the teacher would be trained."""
    sources = logits_by_teacher(teacher_signals.logits).values()
    tensors = [value for source in sources for value in vars(source).values() if isinstance(value, Tensor)]
    tensors += teacher_signals.features.values()
    return ["the teacher's signals require a gradient"] if any(tensor.requires_grad for tensor in tensors) else []


def _allclose(actual: Tensor, expected: Tensor, absolute_tolerance: float = 1e-6) -> bool:
    """Return whether two tensors are equal up to rounding; True if a value is not finite, which other checks report."""
    actual, expected = actual.double(), expected.double().to(actual.device)
    largest = torch.maximum(actual.abs().max(), expected.abs().max())
    tolerance = _RELATIVE_TOLERANCE * largest + absolute_tolerance
    return not largest.isfinite() or bool((actual - expected).abs().max() <= tolerance)
