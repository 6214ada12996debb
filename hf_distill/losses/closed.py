"""Closed forms: each loss and its gradient by the student's logits, for blocks that fit in a cache.

p and q as in `divergence.py`. With g = the derivative of the loss by p, the gradient by the student's logits is
p * (g - sum(p * g)) / temperature.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.linalg import vecdot

from . import divergence, hard
from .registry import gradient_of


class Softmax(NamedTuple):
    """logits [r, V] as divided by the temperature, probs [r, V], lse [r, 1]: log of the sum of exp(logits)."""

    logits: Tensor
    probs: Tensor
    lse: Tensor


class Pair:
    """The logits of both models for a block of asked tokens, and their softmaxes, each made once.

    student, teacher: [r, V] in float32 or better, over the same ids; teacher is None where there is none
    labels:           [r]
    """

    def __init__(self, student: Tensor, teacher: Tensor | None, labels: Tensor):
        self.student, self.teacher, self.labels = student, teacher, labels
        self._made: dict[tuple[bool, float], Softmax] = {}

    def p(self, temperature: float = 1.0) -> Softmax:
        """The student's; not to be written to."""
        return self._softmax(True, temperature)

    def q(self, temperature: float = 1.0) -> Softmax:
        """The teacher's; not to be written to."""
        return self._softmax(False, temperature)

    def _softmax(self, student: bool, temperature: float) -> Softmax:
        if (student, temperature) not in self._made:
            logits: Any = self.student if student else self.teacher
            z = logits if temperature == 1.0 else logits / temperature
            probs = torch.softmax(z, -1)
            lse = z.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
            self._made[student, temperature] = Softmax(z, probs, lse)
        return self._made[student, temperature]


def _by_logits(p: Tensor, g: Tensor, factor: float) -> Tensor:
    """factor * p * (g - sum(p * g)), written over g."""
    g.sub_(vecdot(p, g)[:, None]).mul_(p)
    return g if factor == 1.0 else g.mul_(factor)


@gradient_of(hard.cross_entropy)
def cross_entropy(pair: Pair, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """p - smoothed labels."""
    z, p, lse = pair.p()
    values = lse[:, 0] - z.gather(1, pair.labels[:, None])[:, 0]
    hit = torch.full_like(pair.labels, 1.0, dtype=p.dtype)[:, None]
    if not label_smoothing:
        return values, p.scatter_add(1, pair.labels[:, None], -hit)
    values = (1 - label_smoothing) * values + label_smoothing * (lse[:, 0] - z.mean(-1))
    by_logits = p - label_smoothing / z.shape[-1]
    return values, by_logits.scatter_add_(1, pair.labels[:, None], (label_smoothing - 1) * hit)


@gradient_of(divergence.forward_kl)
def forward_kl(pair: Pair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(p - q) / temperature."""
    z, p, lse_s = pair.p(temperature)
    y, q, lse_t = pair.q(temperature)
    difference = y - z
    values = vecdot(q, difference) + (lse_s - lse_t)[:, 0]
    torch.sub(p, q, out=difference)
    return values, difference if temperature == 1.0 else difference.div_(temperature)


@gradient_of(divergence.reverse_kl)
def reverse_kl(pair: Pair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """p * (log p - log q - KL(p || q)) / temperature."""
    z, p, lse_s = pair.p(temperature)
    y, _, lse_t = pair.q(temperature)
    ratio = (z - y).sub_(lse_s - lse_t)
    return vecdot(p, ratio), _by_logits(p, ratio, 1 / temperature)


def _mixture(p: Tensor, q: Tensor, q_share: float) -> Tensor:
    """q_share * q + (1 - q_share) * p, kept above 0."""
    return torch.lerp(p, q, q_share).clamp_(min=torch.finfo(p.dtype).tiny)


@gradient_of(divergence.js)
def js(pair: Pair, *, temperature: float = 1.0, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """(1 - beta) * p * (log p - log m - KL(p || m)) / temperature."""
    z, p, lse_s = pair.p(temperature)
    y, q, lse_t = pair.q(temperature)
    log_m = _mixture(p, q, beta).log_()
    from_t = vecdot(q, y - log_m) - lse_t[:, 0]
    ratio = torch.sub(z, log_m, out=log_m).sub_(lse_s)
    values = beta * from_t + (1 - beta) * vecdot(p, ratio)
    return values, _by_logits(p, ratio, (1 - beta) / temperature)


@gradient_of(divergence.skew_kl)
def skew_kl(pair: Pair, *, temperature: float = 1.0, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """g = -(1 - lam) * q / m."""
    p = pair.p(temperature).probs
    y, q, lse_t = pair.q(temperature)
    m = _mixture(p, q, lam)
    g = q / m
    values = vecdot(q, torch.sub(y, m.log_(), out=m)) - lse_t[:, 0]
    return values, _by_logits(p, g, (lam - 1) / temperature)


@gradient_of(divergence.skew_reverse_kl)
def skew_reverse_kl(pair: Pair, *, temperature: float = 1.0, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """g = log p - log m - lam * p / m."""
    z, p, lse_s = pair.p(temperature)
    m = _mixture(p, pair.q(temperature).probs, 1 - lam)
    share = p / m
    ratio = torch.sub(z, m.log_(), out=m).sub_(lse_s)
    values = vecdot(p, ratio)
    return values, _by_logits(p, ratio.sub_(share, alpha=lam), 1 / temperature)


@gradient_of(divergence.total_variation)
def total_variation(pair: Pair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """g = sign(p - q) / 2."""
    p = pair.p(temperature).probs
    difference = p - pair.q(temperature).probs
    values = 0.5 * torch.linalg.vector_norm(difference, ord=1, dim=-1)
    return values, _by_logits(p, difference.sign_(), 0.5 / temperature)


@gradient_of(divergence.adaptive_kl)
def adaptive_kl(pair: Pair, *, temperature: float = 1.0, head_mass: float = 0.5) -> tuple[Tensor, Tensor]:
    """w * forward KL's + (1 - w) * reverse KL's."""
    weight = divergence.head_weight(pair.p(temperature).probs, pair.q(temperature).probs, head_mass)
    forward, by_forward = forward_kl(pair, temperature=temperature)
    reverse, by_reverse = reverse_kl(pair, temperature=temperature)
    return weight * forward + (1 - weight) * reverse, by_reverse.lerp_(by_forward, weight[:, None])
