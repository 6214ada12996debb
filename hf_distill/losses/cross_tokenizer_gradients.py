"""Analytic gradients of the losses for a teacher with another tokenizer; see `analytic_gradients.py`.

Only the rows of tokens in chunks have a gradient; for losses on the first tokens of chunks, only these rows.
"""

import numpy as np
import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits
from ..core.logits import SparseLogProbs
from . import cross_tokenizer
from .analytic_gradients import BlockLogits, forward_kl, logit_gradient, sparse_forward_kl
from .class_logits import class_logits, class_maps, logit_gradient_of_classes, sparse_class_log_probs
from .cross_tokenizer import (
    ALM_TAU,
    at_first_tokens,
    check_is_at_temperature_1,
    chunk_log_probs,
    chunk_sums,
    match_likelihoods,
    sorted_sparse_probs,
    teacher_first_logits,
    vocab_size_of_teacher,
)
from .registry import register_gradient

LOG_FROM_PROB = 1e-30  # above this probability, its log is more precise than the logit minus the log-sum-exp


@register_gradient(cross_tokenizer.alm)
def alm(block: BlockLogits, *, tau: float = ALM_TAU) -> tuple[Tensor, Tensor]:
    """Approximate likelihood matching; its gradient is d * (onehot(label) - p) at each token of a chunk.

    d is the derivative with respect to the log-probability of the chunk. Near s = 0 it grows as 1 / |s|, but no faster
    than 1 - p(label) shrinks: the gradient is at most min(tau, |t|) large.
    """
    chunks: AlignedLogits = block.aligned_teacher
    z, p, lse = block.student_softmax()
    labels = block.labels[:, None]
    label_probs = p.gather(1, labels)
    log_probs = torch.where(label_probs > LOG_FROM_PROB, label_probs.log(), z.gather(1, labels) - lse)[:, 0]
    values, derivative = match_likelihoods(chunk_sums(log_probs, chunks), chunk_log_probs(chunks).to(log_probs), tau)
    of_tokens = torch.nn.functional.pad(derivative, (0, 1))[chunks.chunks][:, None]  # chunk -1 has the derivative 0
    grad_logits = torch.mul(p, -of_tokens, out=block.new_buffer())
    grad_logits.scatter_add_(1, labels, of_tokens)
    return at_first_tokens(values, chunks), grad_logits


@register_gradient(cross_tokenizer.projected_kl)
def projected_kl(block: BlockLogits, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """KL of classes; its gradient is share(v) * (P(k) - Q(k)) / temperature for an id v with that share of class k."""
    chunks: AlignedLogits = block.aligned_teacher
    first_logits = teacher_first_logits(chunks, temperature, block.student)
    rows = _first_rows(block)
    vocab_sizes = rows.student.shape[1], vocab_size_of_teacher(chunks)
    of_student, of_teacher = class_maps(chunks.token_classes, *vocab_sizes, rows.student.device)
    student = class_logits(rows.student, of_student, rows.new_buffer)
    # The logit of a class of the teacher may be -inf, see `class_logits`.
    classes = rows.with_student(student.logits, may_be_masked=rows.may_be_masked or len(of_teacher.groups) > 0)
    if isinstance(first_logits, SparseLogProbs):
        check_is_at_temperature_1(temperature)
        values, gradient = sparse_forward_kl(classes.with_teacher(sparse_class_log_probs(first_logits, of_teacher)))
    else:
        teacher = class_logits(first_logits, of_teacher, rows.new_buffer, exact=False)
        values, gradient = forward_kl(classes.with_teacher(teacher.logits), temperature=temperature)
    grad_logits = logit_gradient_of_classes(gradient, of_student, student, out=rows.new_buffer())
    return at_first_tokens(values, chunks), _at_first_rows(block, grad_logits)


@register_gradient(cross_tokenizer.uld)
def uld(block: BlockLogits, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """L1 distance of sorted probabilities; g(v) = sign(p(v) - q_(i)), where i is the rank of v."""
    chunks: AlignedLogits = block.aligned_teacher
    first_logits = teacher_first_logits(chunks, temperature, block.student)
    rows = _first_rows(block)
    p = rows.student_softmax(temperature).probs
    order = _descending_order(p)
    sorted_probs = p.gather(1, order)
    if isinstance(first_logits, SparseLogProbs):
        teacher_probs, tail = sorted_sparse_probs(first_logits, p)
    else:
        teacher_probs, tail = _sort_descending(torch.softmax(first_logits / temperature, -1)), None
    count = min(teacher_probs.shape[1], p.shape[1])
    difference = sorted_probs
    difference[:, :count] -= teacher_probs[:, :count]
    values = teacher_probs[:, count:].sum(1)
    if tail is None:
        values += difference.abs().sum(1)
    else:
        of_tail = difference[:, count:].sum(1) - tail
        values += difference[:, :count].abs().sum(1) + of_tail.abs()
        difference[:, count:] = of_tail[:, None]
    g = rows.new_buffer().scatter_(1, order, difference.sign_())
    return at_first_tokens(values, chunks), _at_first_rows(block, logit_gradient(rows, p, g, 1 / temperature))


def _first_rows(block: BlockLogits) -> BlockLogits:
    """Return the student logits of the first token of each chunk, [C, V]."""
    first_tokens = block.aligned_teacher.first_tokens
    if len(first_tokens) == len(block.labels):  # each token is a chunk, and the softmaxes can be shared
        return block
    rows = block.new_buffer(len(first_tokens), block.student.shape[1])
    return block.with_student(torch.index_select(block.student, 0, first_tokens, out=rows))


def _at_first_rows(block: BlockLogits, gradient: Tensor) -> Tensor:
    """Return a gradient [C, V] at the first token of each chunk, and 0 at other tokens, [r, V]."""
    first_tokens = block.aligned_teacher.first_tokens
    if len(first_tokens) == len(block.labels):
        return gradient
    return block.new_buffer().zero_().index_copy_(0, first_tokens, gradient)


# On a CPU, NumPy sorts float32 in a tenth of the time that PyTorch takes.
def _descending_order(values: Tensor) -> Tensor:
    """Return the indices that sort each row from the largest value, [C, V]."""
    if values.device.type != "cpu":
        return values.argsort(-1, descending=True)
    return torch.from_numpy(np.argsort(-values.numpy(), -1))


def _sort_descending(values: Tensor) -> Tensor:
    """Return each row sorted from the largest value, [C, V]."""
    if values.device.type != "cpu":
        return values.sort(-1, descending=True).values
    return torch.from_numpy(np.sort(-values.numpy(), -1)).neg_()
