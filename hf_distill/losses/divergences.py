"""Divergences between the two distributions over the next token, in nats per asked token.

p is the student's distribution and q the teacher's: softmax(logits / temperature) over the ids that both models have.
Arguments, the same for all:
    student:     signals, or logits [T, V_s]
    teacher:     signals, or logits [T, V_t]; no gradient reaches it
    targets:     not used
    temperature: divides both logits. The distiller multiplies the loss by its square, so that gradients keep their size
                 as the temperature grows; these functions do not.
Each returns [T], 0 where p = q.
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


@loss("forward_kl", needs=("logits",), paper="1503.02531")
def forward_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student): the student covers every mode of the teacher.

    sum_v q(v) * (log q(v) - log p(v))

    For a one-hot teacher: the cross entropy with its label. Of a sampled teacher (2503.16870), whose draws have the
    weights w(v): sum_v w(v) * (log q(v) - log p(v)), whose mean over draws is the divergence, also of the gradients.
    Source: Hinton, Vinyals, Dean, arXiv 1503.02531.
    """
    s, t = align(student, teacher, temperature, sampled=True)
    told = teacher.logits if isinstance(teacher, Signals) else None
    if isinstance(told, SparseLogProbs) and told.negative_entropy is not None:
        return told.negative_entropy.to(s.dtype) - (t.exp() * s).sum(-1)
    return _mean(t, t - s)


@loss("reverse_kl", needs=("logits",), paper="2306.08543")
def reverse_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """KL(student || teacher): the student keeps to modes that the teacher has.

    sum_v p(v) * (log p(v) - log q(v))

    Source: MiniLLM, arXiv 2306.08543.
    """
    s, t = align(student, teacher, temperature)
    return _mean(s, s - t)


@loss("js", needs=("logits",), paper="2306.13649", limits={"beta": BETWEEN_0_AND_1})
def js(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 0.5,
) -> Tensor:
    """Generalised Jensen-Shannon divergence.

    beta * KL(q || m) + (1 - beta) * KL(p || m), m = beta * q + (1 - beta) * p, beta in (0, 1)

    Symmetric at beta = 0.5 and then at most log 2. Divided by beta it tends to forward KL as beta -> 0, divided by
    1 - beta to reverse KL as beta -> 1. Source: GKD, arXiv 2306.13649.
    """
    _inside("beta", beta)
    s, t = align(student, teacher, temperature)
    m = _log_mixture(t, s, beta)
    return beta * _mean(t, t - m) + (1 - beta) * _mean(s, s - m)


@loss("skew_kl", needs=("logits",), paper="2402.03898", limits={"lam": BETWEEN_0_AND_1})
def skew_kl(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    lam: float = 0.1,
) -> Tensor:
    """KL from the teacher to a mixture of both: forward KL whose gradient stays bounded.

    KL(q || lam * q + (1 - lam) * p), lam in (0, 1)

    Tends to forward KL as lam -> 0. Source: DistiLLM, arXiv 2402.03898.
    """
    _inside("lam", lam)
    s, t = align(student, teacher, temperature)
    return _mean(t, t - _log_mixture(t, s, lam))


@loss("skew_reverse_kl", needs=("logits",), paper="2402.03898", limits={"lam": BETWEEN_0_AND_1})
def skew_reverse_kl(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    lam: float = 0.1,
) -> Tensor:
    """KL from the student to a mixture of both: reverse KL whose gradient stays bounded.

    KL(p || (1 - lam) * q + lam * p), lam in (0, 1)

    Tends to reverse KL as lam -> 0. Source: DistiLLM, arXiv 2402.03898.
    """
    _inside("lam", lam)
    s, t = align(student, teacher, temperature)
    return _mean(s, s - _log_mixture(t, s, 1 - lam))


@loss("total_variation", needs=("logits",), paper="2307.15190")
def total_variation(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Half the sum of absolute differences, in [0, 1] (no nats).

    0.5 * sum_v |p(v) - q(v)|

    1 where the two share no mass. Source: f-DISTILL, arXiv 2307.15190.
    """
    s, t = align(student, teacher, temperature)
    return 0.5 * (s.exp() - t.exp()).abs().sum(-1)


@loss("adaptive_kl", needs=("logits",), paper="2404.02657", limits={"head_mass": BETWEEN_0_AND_1})
def adaptive_kl(
    student: Signals | Tensor,
    teacher: Signals | Tensor,
    targets: Targets | None = None,
    *,
    temperature: float = 1.0,
    head_mass: float = 0.5,
) -> Tensor:
    """Forward and reverse KL, each as much as the student errs in the teacher's head and in its tail.

    w * KL(q || p) + (1 - w) * KL(p || q), w = gap in the head / gap in the head and the tail

    The head is the teacher's most probable ids up to a mass of `head_mass`, at least one; a gap is the sum of |p - q|;
    no gradient flows through w. Source: Wu et al., arXiv 2404.02657.
    """
    s, t = align(student, teacher, temperature)
    weight = adaptive_weight(s.detach().exp(), t.exp(), head_mass)
    return weight * _mean(t, t - s) + (1 - weight) * _mean(s, s - t)


def adaptive_weight(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    """The `w` of `adaptive_kl`, [T], from the probabilities of student and teacher; 0.5 where they are equal.

    Raises:
        DistillError: `head_mass` outside (0, 1).
    """
    _inside("head_mass", head_mass)
    top, order = q.sort(-1, descending=True)
    gap = (p.gather(-1, order) - top).abs()
    tail = cumulative_sum(top) > head_mass
    tail[:, 0] = False
    whole = gap.sum(-1)
    return torch.where(whole > 0, gap.masked_fill(tail, 0).sum(-1) / whole.clamp(min=1e-30), 0.5)


def _mean(log_probs: Tensor, values: Tensor) -> Tensor:
    """sum_v exp(log_probs(v)) * values(v), [T], where an id without probability (-inf) adds 0, whatever its value."""
    return (log_probs.exp() * values.masked_fill(log_probs == -torch.inf, 0)).sum(-1)


def _log_mixture(log_q: Tensor, log_p: Tensor, share: float) -> Tensor:
    """log(share * q + (1 - share) * p), [T, V]; finite where both are 0, for the sake of gradients."""
    return torch.logaddexp(log_q.clamp(min=LOG_ZERO) + math.log(share), log_p.clamp(min=LOG_ZERO) + math.log1p(-share))


def _inside(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise DistillError(f"{name} is {value}; it must lie between 0 and 1, both excluded")
