"""Analytic gradients: for each loss, a function that returns its values and its gradient by the student logits.

They work on one block of r target tokens, which fits a CPU's cache, and keep their temporaries in a buffer pool. Each
takes a `BlockLogits` and the options of its loss, and returns (loss [r], gradient with respect to the student logits
[r, V]); the caller may overwrite the gradient.

p and q are the softmaxes of student and teacher, as in `divergences.py`. If g is the derivative of the loss with
respect to p, the gradient with respect to the student logits is p * (g - sum_v p(v) * g(v)) / temperature.
"""

import builtins
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits
from ..core.logits import SparseLogProbs
from . import divergences
from .alignment import LOG_ZERO, check_temperature
from .cross_entropy import cross_entropy as cross_entropy_loss
from .divergences import ADAPTIVE_HEAD_MASS, JS_BETA, SKEW_LAM
from .registry import register_gradient


class Softmax(NamedTuple):
    """A softmax of r tokens.

    logits: [r, V], divided by the temperature
    probs:  [r, V]
    lse:    [r, 1] log-sum-exp of the logits
    """

    logits: Tensor
    probs: Tensor
    lse: Tensor


class BufferPool:
    """Buffers that all blocks reuse: an allocator would map and fault the pages of each block's temporaries again."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._num_acquired = 0

    def acquire(self, like: Tensor, *shape: int) -> Tensor:
        """Return an uninitialized tensor, valid until it is released.

        Args:
            like: tensor of the same dtype and device.
            shape: of the tensor; that of `like` if it is left out.
        """
        shape = shape or like.shape
        numel = math.prod(shape)
        if self._num_acquired == len(self._buffers):
            self._buffers.append(like.new_empty(0))
        buffer = self._buffers[self._num_acquired]
        if buffer.numel() < numel or buffer.dtype != like.dtype:
            buffer = self._buffers[self._num_acquired] = like.new_empty(numel)
        self._num_acquired += 1
        return buffer[:numel].view(shape)

    def release_last(self) -> None:
        """Release the buffer that was acquired last."""
        self._num_acquired -= 1

    def release_all(self) -> None:
        """Release all buffers."""
        self._num_acquired = 0


class BlockLogits:
    """The logits of student and teacher for a block of target tokens; each softmax is computed once.

    student, teacher: [r, V] in float32 or float64, over the ids that both models have; teacher may be None
    teacher_full:     [r, V_t] teacher logits over all ids of the teacher
    labels:           [r]
    sparse_teacher:   the log-probabilities of a sparse teacher, instead of teacher logits
    aligned_teacher:  the chunks of a teacher of another tokenizer, instead of teacher logits
    may_be_masked:    whether some logits may be -inf
    """

    def __init__(
        self,
        student: Tensor,
        teacher: Tensor | None,
        labels: Tensor,
        buffer_pool: BufferPool,
        may_be_masked: bool = False,
    ):
        self.student, self.teacher, self.labels, self._buffer_pool = student, teacher, labels, buffer_pool
        self.may_be_masked = may_be_masked
        self.teacher_full: Any = teacher
        self.sparse_teacher: Any = None
        self.aligned_teacher: Any = None
        self._student_softmaxes: dict[float, Softmax] = {}
        self._teacher_softmaxes: dict[float, Softmax] = {}

    def with_teacher(self, teacher: Tensor | SparseLogProbs | AlignedLogits) -> "BlockLogits":
        """Return the logits of the same student and of a teacher, over the ids that both models have.

        Args:
            teacher: [r, V_t] logits, or sparse log-probabilities of r tokens; or chunks of a teacher of another
                tokenizer, with which the student keeps all ids.
        """
        if isinstance(teacher, AlignedLogits):
            block = BlockLogits(self.student, None, self.labels, self._buffer_pool, self.may_be_masked)
            block.aligned_teacher, block._student_softmaxes = teacher, self._student_softmaxes
            return block
        sparse, full = (teacher, None) if isinstance(teacher, SparseLogProbs) else (None, teacher)
        vocab_size = teacher.vocab_size if isinstance(teacher, SparseLogProbs) else teacher.shape[1]
        shared = self.student.shape[1] if vocab_size is None else min(vocab_size, self.student.shape[1])
        shared_teacher = full if full is None else full[:, :shared]
        block = BlockLogits(
            self.student[:, :shared], shared_teacher, self.labels, self._buffer_pool, self.may_be_masked
        )
        block.sparse_teacher, block.teacher_full = sparse, full
        if shared == self.student.shape[1]:
            block._student_softmaxes = self._student_softmaxes
        return block

    def slice(self, rows: builtins.slice, student_only: "BlockLogits | None" = None) -> "BlockLogits":
        """Return the logits of some target tokens, with the softmaxes that were computed for the whole block.

        Args:
            rows: target tokens.
            student_only: these rows of the object whose `with_teacher` made this one; the two share the student's
                softmaxes if both have all ids of the student.
        """
        teacher, full = (None if t is None else t[rows] for t in (self.teacher, self.teacher_full))
        block = BlockLogits(self.student[rows], teacher, self.labels[rows], self._buffer_pool, self.may_be_masked)
        block.teacher_full = full
        block._student_softmaxes = _slice(self._student_softmaxes, rows)
        block._teacher_softmaxes = _slice(self._teacher_softmaxes, rows)
        if student_only is not None and student_only.student.shape == block.student.shape:
            block._student_softmaxes = student_only._student_softmaxes
        return block

    def student_softmax(self, temperature: float = 1.0) -> Softmax:
        """Return the softmax of the student logits / temperature; callers must not write to it."""
        return self._softmax(self._student_softmaxes, self.student, temperature)

    def teacher_softmax(self, temperature: float = 1.0) -> Softmax:
        """Return the softmax of the teacher logits / temperature; callers must not write to it."""
        return self._softmax(self._teacher_softmaxes, self.teacher, temperature)

    def with_student(self, student: Tensor, may_be_masked: bool | None = None) -> "BlockLogits":
        """Return other student logits without a teacher, whose temporaries are in the same buffers.

        Args:
            student: logits of other rows or ids.
            may_be_masked: whether some logits may be -inf; None for that of this block.
        """
        masked = self.may_be_masked if may_be_masked is None else may_be_masked
        return BlockLogits(student, None, self.labels[: len(student)], self._buffer_pool, masked)

    def new_buffer(self, *shape: int) -> Tensor:
        """Return an uninitialized tensor that is valid until the next block: [r, V] if no shape is given."""
        return self._buffer_pool.acquire(self.student, *shape)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the dot product of each row, [r].

        Args:
            a: [r, V].
            b: [r, V].
        """
        product = torch.mul(a, b, out=self.new_buffer())
        self._buffer_pool.release_last()
        return product.sum(-1)

    def expectation(self, probs: Tensor, values: Tensor) -> Tensor:
        """Return sum_v probs(v) * values(v), [r]; an id with probability 0 adds 0, even if its value is infinite.

        Args:
            probs: [r, V].
            values: [r, V].
        """
        if self.may_be_masked:
            values = torch.where(probs == 0, 0, values)
        return self.dot(probs, values)

    def _softmax(self, softmaxes: dict[float, Softmax], logits: Any, temperature: float) -> Softmax:
        if temperature not in softmaxes:
            z = logits if temperature == 1.0 else torch.div(logits, temperature, out=self.new_buffer())
            probs = torch.softmax(z, -1, out=self.new_buffer())
            lse = z.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
            softmaxes[temperature] = Softmax(z, probs, lse)
        return softmaxes[temperature]


def _slice(softmaxes: dict[float, Softmax], rows: slice) -> dict[float, Softmax]:
    """Return the softmaxes of some rows by their temperatures."""
    return {temperature: Softmax(*(t[rows] for t in softmax)) for temperature, softmax in softmaxes.items()}


def logit_gradient(block: BlockLogits, p: Tensor, g: Tensor, factor: float) -> Tensor:
    """Return factor * p * (g - sum_v p(v) * g(v)), [r, V], and overwrite g with it."""
    if block.may_be_masked:
        g.masked_fill_(p == 0, 0)
    g.sub_(block.dot(p, g)[:, None]).mul_(p)
    return g if factor == 1.0 else g.mul_(factor)


@register_gradient(cross_entropy_loss)
def cross_entropy(block: BlockLogits, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Cross entropy with the labels; its gradient is p - (smoothed one-hot labels)."""
    z, p, lse = block.student_softmax()
    values = lse[:, 0] - z.gather(1, block.labels[:, None])[:, 0]
    one = torch.full_like(block.labels, 1.0, dtype=p.dtype)[:, None]
    grad_logits = (
        torch.sub(p, label_smoothing / z.shape[-1], out=block.new_buffer())
        if label_smoothing
        else block.new_buffer().copy_(p)
    )
    grad_logits.scatter_add_(1, block.labels[:, None], (label_smoothing - 1) * one)
    if not label_smoothing:
        return values, grad_logits
    values = (1 - label_smoothing) * values + label_smoothing * (lse[:, 0] - z.mean(-1))
    return values, grad_logits


@register_gradient(divergences.forward_kl)
def forward_kl(block: BlockLogits, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Forward KL; its gradient is (p - q) / temperature."""
    z, p, lse_s = block.student_softmax(temperature)
    y, q, lse_t = block.teacher_softmax(temperature)
    difference = torch.sub(y, z, out=block.new_buffer())
    values = block.expectation(q, difference) + (lse_s - lse_t)[:, 0]
    torch.sub(p, q, out=difference)
    return values, difference if temperature == 1.0 else difference.div_(temperature)


@register_gradient(divergences.forward_kl, sparse=True)
def sparse_forward_kl(block: BlockLogits, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Forward KL of a sparse teacher.

    w(v) is the teacher's probability of a stored id v (a sampled teacher's weight), and m the sum of all its
    probabilities. The gradient is (m * p - w) / temperature. A top-k teacher has the mass w' outside its stored ids,
    where the student has p': with r = w' / p', the gradient is (m * p - w) / temperature at stored ids and
    (m - r) * p / temperature elsewhere.
    """
    teacher: SparseLogProbs = block.sparse_teacher
    check_temperature(teacher, temperature)
    z, p, lse = block.student_softmax(temperature)
    log_w = teacher.log_probs.to(p.dtype).clamp(min=LOG_ZERO)
    weights, log_p = log_w.exp(), z.gather(1, teacher.ids) - lse
    mass = weights.sum(1)
    log_tail = None if teacher.ids.shape[1] == p.shape[1] else teacher.log_tail
    if log_tail is None:
        if teacher.negative_entropy is None:
            negative_entropy = (weights * log_w).sum(1)
        else:
            negative_entropy = teacher.negative_entropy.to(p.dtype)
        values = negative_entropy - (weights * log_p).sum(1)
        grad_logits = torch.mul(p, mass[:, None], out=block.new_buffer())
        grad_logits.scatter_add_(1, teacher.ids, -weights)
    else:
        log_tail = log_tail.to(p.dtype).clamp(min=LOG_ZERO)
        # Padding slots of a row with fewer than K ids (log_prob = -inf) must not contribute.
        student_probs = log_p.exp().mul_(teacher.log_probs > LOG_ZERO)
        student_tail = (1 - student_probs.sum(1)).clamp(min=torch.finfo(p.dtype).eps)
        ratio = log_tail.exp() / student_tail
        values = (weights * (log_w - log_p)).sum(1) + log_tail.exp() * (log_tail - student_tail.log())
        grad_logits = torch.mul(p, (mass + log_tail.exp() - ratio)[:, None], out=block.new_buffer())
        grad_logits.scatter_add_(1, teacher.ids, ratio[:, None] * student_probs - weights)
    return values, grad_logits if temperature == 1.0 else grad_logits.div_(temperature)


@register_gradient(divergences.reverse_kl)
def reverse_kl(block: BlockLogits, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Reverse KL; its gradient is p * (log p - log q - KL(p || q)) / temperature."""
    z, p, lse_s = block.student_softmax(temperature)
    y, _, lse_t = block.teacher_softmax(temperature)
    ratio = torch.sub(z, y, out=block.new_buffer()).sub_(lse_s - lse_t)
    return block.expectation(p, ratio), logit_gradient(block, p, ratio, 1 / temperature)


def _mixture(block: BlockLogits, temperature: float, q_share: float) -> Tensor:
    """Return q_share * q + (1 - q_share) * p, [r, V], clamped above 0."""
    p, q = block.student_softmax(temperature).probs, block.teacher_softmax(temperature).probs
    return torch.lerp(p, q, q_share, out=block.new_buffer()).clamp_(min=torch.finfo(p.dtype).tiny)


@register_gradient(divergences.js)
def js(block: BlockLogits, *, temperature: float = 1.0, beta: float = JS_BETA) -> tuple[Tensor, Tensor]:
    """Generalized Jensen-Shannon divergence; its gradient is (1 - beta) * p * (log p - log m - KL(p || m)) / T."""
    z, p, lse_s = block.student_softmax(temperature)
    y, q, lse_t = block.teacher_softmax(temperature)
    log_m = _mixture(block, temperature, beta).log_()
    # lse is subtracted before the sum: it may be 20, and the sum of q is 1 only to within 1e-5.
    teacher_kl = block.expectation(q, torch.sub(y, log_m, out=block.new_buffer()).sub_(lse_t))
    ratio = torch.sub(z, log_m, out=log_m).sub_(lse_s)
    values = beta * teacher_kl + (1 - beta) * block.expectation(p, ratio)
    return values, logit_gradient(block, p, ratio, (1 - beta) / temperature)


@register_gradient(divergences.skew_kl)
def skew_kl(block: BlockLogits, *, temperature: float = 1.0, lam: float = SKEW_LAM) -> tuple[Tensor, Tensor]:
    """Skew KL; g = -(1 - lam) * q / m."""
    p = block.student_softmax(temperature).probs
    y, q, lse_t = block.teacher_softmax(temperature)
    m = _mixture(block, temperature, lam)
    g = torch.div(q, m, out=block.new_buffer())
    values = block.expectation(q, torch.sub(y, m.log_(), out=m).sub_(lse_t))
    return values, logit_gradient(block, p, g, (lam - 1) / temperature)


@register_gradient(divergences.skew_reverse_kl)
def skew_reverse_kl(block: BlockLogits, *, temperature: float = 1.0, lam: float = SKEW_LAM) -> tuple[Tensor, Tensor]:
    """Skew reverse KL; g = log p - log m - lam * p / m."""
    z, p, lse_s = block.student_softmax(temperature)
    m = _mixture(block, temperature, 1 - lam)
    share = torch.div(p, m, out=block.new_buffer())
    ratio = torch.sub(z, m.log_(), out=m).sub_(lse_s)
    values = block.expectation(p, ratio)
    return values, logit_gradient(block, p, ratio.sub_(share, alpha=lam), 1 / temperature)


@register_gradient(divergences.total_variation)
def total_variation(block: BlockLogits, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Total variation; g = sign(p - q) / 2."""
    p = block.student_softmax(temperature).probs
    difference = torch.sub(p, block.teacher_softmax(temperature).probs, out=block.new_buffer())
    values = 0.5 * torch.linalg.vector_norm(difference, ord=1, dim=-1)
    return values, logit_gradient(block, p, difference.sign_(), 0.5 / temperature)


@register_gradient(divergences.adaptive_kl)
def adaptive_kl(
    block: BlockLogits, *, temperature: float = 1.0, head_mass: float = ADAPTIVE_HEAD_MASS
) -> tuple[Tensor, Tensor]:
    """Adaptive KL; its gradient is w * (that of forward KL) + (1 - w) * (that of reverse KL)."""
    weight = divergences.adaptive_weight(
        block.student_softmax(temperature).probs, block.teacher_softmax(temperature).probs, head_mass
    )
    forward, grad_forward = forward_kl(block, temperature=temperature)
    reverse, grad_reverse = reverse_kl(block, temperature=temperature)
    return weight * forward + (1 - weight) * reverse, grad_reverse.lerp_(grad_forward, weight[:, None])
