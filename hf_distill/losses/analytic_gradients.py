"""Closed forms: each loss and its gradient by the student's logits, for blocks that fit in a cache.

p and q as in `divergences.py`. With g = the derivative of the loss by p, the gradient by the student's logits is
p * (g - sum(p * g)) / temperature.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.logits import SparseLogProbs
from . import divergences
from .alignment import LOG_ZERO, check_temperature
from .cross_entropy import cross_entropy as cross_entropy_loss
from .registry import register_gradient


class Softmax(NamedTuple):
    """logits [r, V] as divided by the temperature, probs [r, V], lse [r, 1]: log of the sum of exp(logits)."""

    logits: Tensor
    probs: Tensor
    lse: Tensor


class BufferPool:
    """Memory that blocks use again and again: an allocator that gave and took it would fault every page anew."""

    def __init__(self):
        self._kept: list[Tensor] = []
        self._lent = 0

    def take(self, like: Tensor) -> Tensor:
        """An uninitialised tensor of that shape and dtype, until `give_back`."""
        if self._lent == len(self._kept):
            self._kept.append(like.new_empty(0))
        kept = self._kept[self._lent]
        if kept.numel() < like.numel() or kept.dtype != like.dtype:
            kept = self._kept[self._lent] = like.new_empty(like.numel())
        self._lent += 1
        return kept[: like.numel()].view(like.shape)

    def give_back_last(self) -> None:
        """What was lent last is free again."""
        self._lent -= 1

    def give_back(self) -> None:
        """All that was lent is free again."""
        self._lent = 0


class LogitPair:
    """The logits of both models for a block of asked tokens, and their softmaxes, each made once.

    student, teacher: [r, V] in float32 or better, over the same ids; teacher is None where there is none
    labels:           [r]
    whole:            [r, V_t] the teacher's logits over all of its ids
    sparse:           what a sparse teacher says in the place of logits
    masked:           whether some logits may be -inf: ids without any probability
    """

    def __init__(
        self, student: Tensor, teacher: Tensor | None, labels: Tensor, scratch: BufferPool, masked: bool = False
    ):
        self.student, self.teacher, self.labels, self._scratch = student, teacher, labels, scratch
        self.masked = masked
        self.whole: Any = teacher
        self.sparse: Any = None
        self._p: dict[float, Softmax] = {}
        self._q: dict[float, Softmax] = {}

    def beside(self, teacher: Tensor | SparseLogProbs) -> "LogitPair":
        """The same student and a teacher, whose logits are [r, V_t], over the ids that both have; or a sparse one."""
        sparse, whole = (teacher, None) if isinstance(teacher, SparseLogProbs) else (None, teacher)
        size = whole.shape[1] if whole is not None else teacher.vocab_size
        shared = self.student.shape[1] if size is None else min(size, self.student.shape[1])
        both = whole if whole is None else whole[:, :shared]
        pair = LogitPair(self.student[:, :shared], both, self.labels, self._scratch, self.masked)
        pair.sparse, pair.whole = sparse, whole
        if shared == self.student.shape[1]:
            pair._p = self._p
        return pair

    def p(self, temperature: float = 1.0) -> Softmax:
        """The student's; not to be written to."""
        return self._softmax(self._p, self.student, temperature)

    def q(self, temperature: float = 1.0) -> Softmax:
        """The teacher's; not to be written to."""
        return self._softmax(self._q, self.teacher, temperature)

    def take(self) -> Tensor:
        """A tensor [r, V] to write to, as long as the block lasts."""
        return self._scratch.take(self.student)

    def dot(self, a: Tensor, b: Tensor) -> Tensor:
        """The dot product of each row, [r]."""
        product = torch.mul(a, b, out=self.take())
        self._scratch.give_back_last()
        return product.sum(-1)

    def mean(self, probs: Tensor, values: Tensor) -> Tensor:
        """sum_v probs(v) * values(v) of each row, [r], where an id without probability adds 0, whatever its value."""
        if self.masked:
            values = torch.where(probs == 0, 0, values)
        return self.dot(probs, values)

    def _softmax(self, made: dict[float, Softmax], logits: Any, temperature: float) -> Softmax:
        if temperature not in made:
            z = logits if temperature == 1.0 else torch.div(logits, temperature, out=self.take())
            probs = torch.softmax(z, -1, out=self.take())
            lse = z.amax(-1, keepdim=True) - probs.amax(-1, keepdim=True).log()
            made[temperature] = Softmax(z, probs, lse)
        return made[temperature]


def _by_logits(pair: LogitPair, p: Tensor, g: Tensor, factor: float) -> Tensor:
    """factor * p * (g - sum(p * g)), written over g."""
    if pair.masked:
        g.masked_fill_(p == 0, 0)
    g.sub_(pair.dot(p, g)[:, None]).mul_(p)
    return g if factor == 1.0 else g.mul_(factor)


@register_gradient(cross_entropy_loss)
def cross_entropy(pair: LogitPair, *, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """p - smoothed labels."""
    z, p, lse = pair.p()
    values = lse[:, 0] - z.gather(1, pair.labels[:, None])[:, 0]
    hit = torch.full_like(pair.labels, 1.0, dtype=p.dtype)[:, None]
    by_logits = (
        torch.sub(p, label_smoothing / z.shape[-1], out=pair.take()) if label_smoothing else pair.take().copy_(p)
    )
    by_logits.scatter_add_(1, pair.labels[:, None], (label_smoothing - 1) * hit)
    if not label_smoothing:
        return values, by_logits
    values = (1 - label_smoothing) * values + label_smoothing * (lse[:, 0] - z.mean(-1))
    return values, by_logits


@register_gradient(divergences.forward_kl)
def forward_kl(pair: LogitPair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """(p - q) / temperature."""
    z, p, lse_s = pair.p(temperature)
    y, q, lse_t = pair.q(temperature)
    difference = torch.sub(y, z, out=pair.take())
    values = pair.mean(q, difference) + (lse_s - lse_t)[:, 0]
    torch.sub(p, q, out=difference)
    return values, difference if temperature == 1.0 else difference.div_(temperature)


@register_gradient(divergences.forward_kl, sparse=True)
def sparse_forward_kl(pair: LogitPair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """With w the teacher's mass of its ids and m all of it: (m * p - w) / temperature.

    With mass w' outside its ids, where the student has p', and r = w' / p': (m * p - w) / temperature at its ids, and
    (m - r) * p / temperature elsewhere.
    """
    told: SparseLogProbs = pair.sparse
    check_temperature(told, temperature)
    z, p, lse = pair.p(temperature)
    logs = told.log_probs.to(p.dtype).clamp(min=LOG_ZERO)
    weights, log_p = logs.exp(), z.gather(1, told.ids) - lse
    mass = weights.sum(1)
    tail = None if told.ids.shape[1] == p.shape[1] else told.log_tail
    if tail is None:
        own = (weights * logs).sum(1) if told.negative_entropy is None else told.negative_entropy.to(p.dtype)
        values = own - (weights * log_p).sum(1)
        by_logits = torch.mul(p, mass[:, None], out=pair.take())
        by_logits.scatter_add_(1, told.ids, -weights)
    else:
        left = tail.to(p.dtype).clamp(min=LOG_ZERO)
        own = log_p.exp().mul_(told.log_probs > LOG_ZERO)  # a row with fewer ids names the rest of its K in vain
        rest = (1 - own.sum(1)).clamp(min=torch.finfo(p.dtype).eps)
        ratio = left.exp() / rest
        values = (weights * (logs - log_p)).sum(1) + left.exp() * (left - rest.log())
        by_logits = torch.mul(p, (mass + left.exp() - ratio)[:, None], out=pair.take())
        by_logits.scatter_add_(1, told.ids, ratio[:, None] * own - weights)
    return values, by_logits if temperature == 1.0 else by_logits.div_(temperature)


@register_gradient(divergences.reverse_kl)
def reverse_kl(pair: LogitPair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """p * (log p - log q - KL(p || q)) / temperature."""
    z, p, lse_s = pair.p(temperature)
    y, _, lse_t = pair.q(temperature)
    ratio = torch.sub(z, y, out=pair.take()).sub_(lse_s - lse_t)
    return pair.mean(p, ratio), _by_logits(pair, p, ratio, 1 / temperature)


def _mixture(pair: LogitPair, temperature: float, q_share: float) -> Tensor:
    """q_share * q + (1 - q_share) * p, kept above 0."""
    p, q = pair.p(temperature).probs, pair.q(temperature).probs
    return torch.lerp(p, q, q_share, out=pair.take()).clamp_(min=torch.finfo(p.dtype).tiny)


@register_gradient(divergences.js)
def js(pair: LogitPair, *, temperature: float = 1.0, beta: float = 0.5) -> tuple[Tensor, Tensor]:
    """(1 - beta) * p * (log p - log m - KL(p || m)) / temperature."""
    z, p, lse_s = pair.p(temperature)
    y, q, lse_t = pair.q(temperature)
    log_m = _mixture(pair, temperature, beta).log_()
    # The normaliser is subtracted before the sum: q adds up to 1 within 1e-5 only, and it may be 20.
    from_t = pair.mean(q, torch.sub(y, log_m, out=pair.take()).sub_(lse_t))
    ratio = torch.sub(z, log_m, out=log_m).sub_(lse_s)
    values = beta * from_t + (1 - beta) * pair.mean(p, ratio)
    return values, _by_logits(pair, p, ratio, (1 - beta) / temperature)


@register_gradient(divergences.skew_kl)
def skew_kl(pair: LogitPair, *, temperature: float = 1.0, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """g = -(1 - lam) * q / m."""
    p = pair.p(temperature).probs
    y, q, lse_t = pair.q(temperature)
    m = _mixture(pair, temperature, lam)
    g = torch.div(q, m, out=pair.take())
    values = pair.mean(q, torch.sub(y, m.log_(), out=m).sub_(lse_t))
    return values, _by_logits(pair, p, g, (lam - 1) / temperature)


@register_gradient(divergences.skew_reverse_kl)
def skew_reverse_kl(pair: LogitPair, *, temperature: float = 1.0, lam: float = 0.1) -> tuple[Tensor, Tensor]:
    """g = log p - log m - lam * p / m."""
    z, p, lse_s = pair.p(temperature)
    m = _mixture(pair, temperature, 1 - lam)
    share = torch.div(p, m, out=pair.take())
    ratio = torch.sub(z, m.log_(), out=m).sub_(lse_s)
    values = pair.mean(p, ratio)
    return values, _by_logits(pair, p, ratio.sub_(share, alpha=lam), 1 / temperature)


@register_gradient(divergences.total_variation)
def total_variation(pair: LogitPair, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """g = sign(p - q) / 2."""
    p = pair.p(temperature).probs
    difference = torch.sub(p, pair.q(temperature).probs, out=pair.take())
    values = 0.5 * torch.linalg.vector_norm(difference, ord=1, dim=-1)
    return values, _by_logits(pair, p, difference.sign_(), 0.5 / temperature)


@register_gradient(divergences.adaptive_kl)
def adaptive_kl(pair: LogitPair, *, temperature: float = 1.0, head_mass: float = 0.5) -> tuple[Tensor, Tensor]:
    """w * forward KL's + (1 - w) * reverse KL's."""
    weight = divergences.adaptive_weight(pair.p(temperature).probs, pair.q(temperature).probs, head_mass)
    forward, by_forward = forward_kl(pair, temperature=temperature)
    reverse, by_reverse = reverse_kl(pair, temperature=temperature)
    return weight * forward + (1 - weight) * reverse, by_reverse.lerp_(by_forward, weight[:, None])
