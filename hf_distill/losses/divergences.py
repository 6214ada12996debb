"""Divergences between the distributions of student and teacher over the next token, in nats per target token.

p is the student's distribution and q the teacher's: softmax(logits / temperature) over the ids that both models have.
The objective multiplies the losses by temperature^2, so that gradients keep their size as the temperature grows; the
functions of this module do not.
"""

import math

import torch
from torch import Tensor

from ..core.logits import SparseLogProbs, cumulative_sum
from ..core.options import BETWEEN_0_AND_1
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from .alignment import LOG_ZERO as LOG_ZERO
from .alignment import align
from .registry import loss

JS_BETA, SKEW_LAM, ADAPTIVE_HEAD_MASS = 0.5, 0.1, 0.5  # defaults of the options


@loss("forward_kl", compares=("logits",), paper="1503.02531")
def forward_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL, KL(teacher || student): the student covers all modes of the teacher.

    sum_v q(v) * (log q(v) - log p(v))

    With a one-hot teacher it is the cross entropy with the teacher's token. With a sampled teacher (arXiv 2503.16870),
    whose drawn ids have the weights w(v), it is sum_v w(v) * (log q(v) - log p(v)): value and gradient are unbiased.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: temperature is not positive, or the teacher is sparse and cannot be used with this loss or
            temperature.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531.
    """
    s, t = align(student, teacher, temperature, sampled=True)
    sparse = teacher.logits if isinstance(teacher, Signals) else None
    if isinstance(sparse, SparseLogProbs) and sparse.negative_entropy is not None:
        return sparse.negative_entropy.to(s.dtype) - (t.exp() * s).sum(-1)
    return _expectation(t, t - s)


@loss("reverse_kl", compares=("logits",), paper="2306.08543")
def reverse_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Reverse KL, KL(student || teacher): the student concentrates on modes of the teacher.

    sum_v p(v) * (log p(v) - log q(v))

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: temperature is not positive, or the teacher is sparse and cannot be used with this loss or
            temperature.

    Source: MiniLLM, arXiv 2306.08543.
    """
    s, t = align(student, teacher, temperature)
    return _expectation(s, s - t)


@loss("js", compares=("logits",), paper="2306.13649", limits={"beta": BETWEEN_0_AND_1})
def js(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    beta: float = JS_BETA,
) -> Tensor:
    """Generalized Jensen-Shannon divergence.

    beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta * q + (1 - beta) * p

    At beta = 0.5 it is symmetric and at most log 2. Divided by beta it tends to forward KL as beta -> 0; divided by
    1 - beta it tends to reverse KL as beta -> 1.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.
        beta: weight of the teacher in the mixture, in (0, 1).

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: beta is outside (0, 1), temperature is not positive, or the teacher is sparse and cannot be
            used with this loss or temperature.

    Source: GKD, arXiv 2306.13649.
    """
    _check_between_0_and_1("beta", beta)
    s, t = align(student, teacher, temperature)
    m = _log_mixture(t, s, beta)
    return beta * _expectation(t, t - m) + (1 - beta) * _expectation(s, s - m)


@loss("skew_kl", compares=("logits",), paper="2402.03898", limits={"lam": BETWEEN_0_AND_1})
def skew_kl(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    lam: float = SKEW_LAM,
) -> Tensor:
    """Skew KL: KL(teacher || mixture of both), a forward KL with a bounded gradient.

    KL(q || lam * q + (1 - lam) * p)

    It tends to forward KL as lam -> 0.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.
        lam: share of the teacher in the mixture, in (0, 1).

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: lam is outside (0, 1), temperature is not positive, or the teacher is sparse and cannot be
            used with this loss or temperature.

    Source: DistiLLM, arXiv 2402.03898.
    """
    _check_between_0_and_1("lam", lam)
    s, t = align(student, teacher, temperature)
    return _expectation(t, t - _log_mixture(t, s, lam))


@loss("skew_reverse_kl", compares=("logits",), paper="2402.03898", limits={"lam": BETWEEN_0_AND_1})
def skew_reverse_kl(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    lam: float = SKEW_LAM,
) -> Tensor:
    """Skew reverse KL: KL(student || mixture of both), a reverse KL with a bounded gradient.

    KL(p || (1 - lam) * q + lam * p)

    It tends to reverse KL as lam -> 0.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.
        lam: share of the student in the mixture, in (0, 1).

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: lam is outside (0, 1), temperature is not positive, or the teacher is sparse and cannot be
            used with this loss or temperature.

    Source: DistiLLM, arXiv 2402.03898.
    """
    _check_between_0_and_1("lam", lam)
    s, t = align(student, teacher, temperature)
    return _expectation(s, s - _log_mixture(t, s, 1 - lam))


@loss("total_variation", compares=("logits",), paper="2307.15190")
def total_variation(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Total variation distance, in [0, 1] (not in nats).

    0.5 * sum_v |p(v) - q(v)|

    It is 1 where no id has a probability in both distributions.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.

    Returns:
        [T], in [0, 1]; 0 where p = q.

    Raises:
        DistillError: temperature is not positive, or the teacher is sparse and cannot be used with this loss or
            temperature.

    Source: f-DISTILL, arXiv 2307.15190.
    """
    s, t = align(student, teacher, temperature)
    return 0.5 * (s.exp() - t.exp()).abs().sum(-1)


@loss("adaptive_kl", compares=("logits",), paper="2404.02657", limits={"head_mass": BETWEEN_0_AND_1})
def adaptive_kl(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    head_mass: float = ADAPTIVE_HEAD_MASS,
) -> Tensor:
    """Adaptive KL: forward and reverse KL, weighted by the student's errors in the head and tail of the teacher.

    w * KL(q || p) + (1 - w) * KL(p || q), w = gap_head / (gap_head + gap_tail)

    The head of the teacher's distribution is its most probable ids with a probability of at most `head_mass` together,
    and at least one id; the tail is the other ids. A gap is the sum of |p - q|. No gradient flows through w.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.
        head_mass: probability of the head, in (0, 1).

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: head_mass is outside (0, 1), temperature is not positive, or the teacher is sparse and cannot be
            used with this loss or temperature.

    Source: Wu et al., arXiv 2404.02657.
    """
    s, t = align(student, teacher, temperature)
    weight = adaptive_weight(s.detach().exp(), t.exp(), head_mass)
    return weight * _expectation(t, t - s) + (1 - weight) * _expectation(s, s - t)


def adaptive_weight(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """Return the weight w of `adaptive_kl`, [T]; 0.5 where both distributions are equal.

    Args:
        p: [T, V] probabilities of the student.
        q: [T, V] probabilities of the teacher.
        head_mass: probability of the head, in (0, 1).

    Raises:
        DistillError: head_mass is outside (0, 1).
    """
    _check_between_0_and_1("head_mass", head_mass)
    top, order = q.sort(-1, descending=True)
    gap = (p.gather(-1, order) - top).abs()
    tail = cumulative_sum(top) > head_mass
    tail[:, 0] = False
    total_gap = gap.sum(-1)
    head_gap = gap.masked_fill(tail, 0).sum(-1)
    return torch.where(total_gap > 0, head_gap / total_gap.clamp(min=1e-30), 0.5)


def _expectation(log_probs: Tensor, values: Tensor) -> Tensor:
    """Return sum_v exp(log_probs(v)) * values(v), [T]; an id with log-probability -inf adds 0."""
    return (log_probs.exp() * values.masked_fill(log_probs == -torch.inf, 0)).sum(-1)


def _log_mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """Return log(share * q + (1 - share) * p), [T, V]; clamped where both are 0, so that gradients stay finite."""
    return torch.logaddexp(log_q.clamp(min=LOG_ZERO) + math.log(share), log_p.clamp(min=LOG_ZERO) + math.log1p(-share))


def _check_between_0_and_1(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise DistillError(f"{name} is {value}; it must be above 0 and below 1")
