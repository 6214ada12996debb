"""Losses on attention of one pair of layers. In float32 at least; [N] numbers, one a token."""

import math

import torch
from torch import Tensor

from ..core.logits import compute_dtype
from ..core.options import COUNT
from ..core.targets import Targets
from ..errors import DistillError
from .registry import loss


@loss("attention_kl", needs=("attention",), paper="1909.10351")
def attention_kl(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Mean over heads of KL(teacher's map || student's map), for the row of each token.

    Where head counts differ, heads of the model that has more are averaged: neighbours in groups where one count
    divides the other, else in as many overlapping windows as the other has heads. Positions that a model hides
    (padding, the future) have no mass.

    Args:
        student: [N, h_s, S] rows of its maps.
        teacher: [N, h_t, S].
        targets: not used.

    Returns:
        [N] nats. 0 for equal maps.

    Source: attention transfer of TinyBERT, arXiv 1909.10351, as a KL.
    """
    dtype, heads = compute_dtype(student), min(student.shape[1], teacher.shape[1])
    s, t = _pooled(student.to(dtype), heads), _pooled(teacher.to(dtype), heads)
    tiny = torch.finfo(dtype).tiny
    difference = t.clamp(min=tiny).log() - s.clamp(min=tiny).log()
    return (t * difference).sum(-1).mean(-1)


@loss("value_relation", needs=("values",), paper="2002.10957", limits={"heads": COUNT})
def value_relation(student: Tensor, teacher: Tensor, targets: Targets, *, heads: int | None = None) -> Tensor:
    """Mean over relation heads of KL(teacher's || student's) of softmax(v_n . v_u / sqrt(d)) over the positions u.

    The values of all heads are joined and split anew into `heads` relation heads (MiniLM v2), so numbers of heads and
    widths may differ, and no attention map is needed. A position u counts where the token n may see it.

    Args:
        student: [B, h_s, S, d_s] values.
        teacher: [B, h_t, S, d_t].
        targets: the N tokens.
        heads: relation heads; None: the greatest number that divides both h_s and h_t.

    Returns:
        [N] nats. 0 for equal relations.

    Raises:
        DistillError: `heads` does not divide both widths.

    Source: MiniLM, arXiv 2002.10957, and 2012.15828 for relation heads.
    """
    dtype, (_, h_s, length, _), h_t = compute_dtype(student), student.shape, teacher.shape[1]
    heads = heads or math.gcd(h_s, h_t)
    widths = [values.shape[1] * values.shape[3] for values in (student, teacher)]
    if any(width % heads for width in widths):
        raise DistillError(f"value_relation: {heads} heads do not divide the widths {widths[0]} and {widths[1]}.")
    s, t = (_split(values.to(dtype), heads) for values in (student, teacher))
    hidden, columns = ~targets.visible(), targets.positions % length
    result = [s.new_zeros(0)]
    for row, of_row in targets.by_row():
        log_s, log_t = (_relation(values[row], columns[of_row], hidden[of_row]) for values in (s, t))
        result.append((log_t.exp() * (log_t - log_s)).sum(-1).mean(0))
    return torch.cat(result)


def _pooled(maps: Tensor, heads: int) -> Tensor:
    """[N, h, S] -> [N, heads, S], means of neighbours."""
    if maps.shape[1] == heads:
        return maps
    return torch.nn.functional.adaptive_avg_pool1d(maps.transpose(1, 2), heads).transpose(1, 2)


def _split(values: Tensor, heads: int) -> Tensor:
    """[B, h, S, d] -> [B, heads, S, h * d / heads]."""
    return values.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def _relation(values: Tensor, columns: Tensor, hidden: Tensor) -> Tensor:
    """Log-relations of some positions of a row to all of it, [heads, n, S], of values [heads, S, d]."""
    scores = values[:, columns] @ values.transpose(1, 2) / math.sqrt(values.shape[-1])
    return torch.log_softmax(scores.masked_fill(hidden, -1e4), dim=-1)
