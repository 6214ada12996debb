"""Losses on the attention of a pair of layers: one number for each token, [N], computed in float32 or float64."""

import math

import torch
from torch import Tensor

from ..core.logits import compute_dtype
from ..core.options import COUNT
from ..core.targets import Targets
from ..errors import DistillError
from .registry import loss


@loss("attention_kl", compares=("attention",), paper="1909.10351")
def attention_kl(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """KL between the attention maps, averaged over heads.

    mean_h sum_u a_t(h, n, u) * (log a_t(h, n, u) - log a_s(h, n, u)) for token n and positions u

    If the numbers of heads differ, neighboring heads of the model with more heads are averaged (adaptive average
    pooling over heads). Masked positions (padding, later positions) have probability 0.

    Args:
        student: [N, h_s, S] rows of the student's attention maps.
        teacher: [N, h_t, S] rows of the teacher's.
        targets: not used.

    Returns:
        [N] in nats; 0 for equal maps.

    Source: attention transfer of TinyBERT, arXiv 1909.10351, with a KL instead of the squared error.
    """
    dtype, heads = compute_dtype(student), min(student.shape[1], teacher.shape[1])
    s, t = _pooled(student.to(dtype), heads), _pooled(teacher.to(dtype), heads)
    tiny = torch.finfo(dtype).tiny
    difference = t.clamp(min=tiny).log() - s.clamp(min=tiny).log()
    return (t * difference).sum(-1).mean(-1)


@loss("value_relation", compares=("values",), paper="2002.10957", limits={"heads": COUNT})
def value_relation(student: Tensor, teacher: Tensor, targets: Targets, *, heads: int | None = None) -> Tensor:
    """KL between the value relations, averaged over relation heads.

    mean_h KL(r_t || r_s), r(h, n, u) = softmax_u(v(h, n) . v(h, u) / sqrt(d)) for token n and the positions u it sees

    The values of all heads are concatenated and split into `heads` relation heads (MiniLMv2). The models may have
    different numbers of heads and widths, and no attention maps are needed.

    Args:
        student: [B, h_s, S, d_s] values of the student's attention.
        teacher: [B, h_t, S, d_t] values of the teacher's.
        targets: the N tokens.
        heads: number of relation heads; None for the greatest common divisor of h_s and h_t.

    Returns:
        [N] in nats; 0 for equal relations.

    Raises:
        DistillError: `heads` does not divide both widths.

    Source: MiniLM, arXiv 2002.10957; relation heads: MiniLMv2, arXiv 2012.15828.
    """
    dtype, (_, h_s, length, _), h_t = compute_dtype(student), student.shape, teacher.shape[1]
    heads = heads or math.gcd(h_s, h_t)
    widths = [values.shape[1] * values.shape[3] for values in (student, teacher)]
    if any(width % heads for width in widths):
        raise DistillError(
            f"value_relation has heads {heads}, which does not divide the widths of the values, {widths[0]} and "
            f"{widths[1]}: give a number that divides both."
        )
    s, t = (_split(values.to(dtype), heads) for values in (student, teacher))
    masked, columns = ~targets.visible(), targets.positions % length
    result = [s.new_zeros(0)]
    for row, row_tokens in targets.by_row():
        log_s, log_t = (_log_relation(values[row], columns[row_tokens], masked[row_tokens]) for values in (s, t))
        result.append((log_t.exp() * (log_t - log_s)).sum(-1).mean(0))
    return torch.cat(result)


def _pooled(maps: Tensor, heads: int) -> Tensor:
    """Average neighboring heads: [N, h, S] -> [N, heads, S]."""
    if maps.shape[1] == heads:
        return maps
    return torch.nn.functional.adaptive_avg_pool1d(maps.transpose(1, 2), heads).transpose(1, 2)


def _split(values: Tensor, heads: int) -> Tensor:
    """Split the concatenated heads into other heads: [B, h, S, d] -> [B, heads, S, h * d / heads]."""
    return values.transpose(1, 2).flatten(2).unflatten(2, (heads, -1)).transpose(1, 2)


def _log_relation(values: Tensor, columns: Tensor, masked: Tensor) -> Tensor:
    """Return the log-softmax relations of n positions of a row to all of its positions, [heads, n, S].

    Args:
        values: [heads, S, d] of the row.
        columns: [n] positions.
        masked: [n, S] positions that a token does not attend to.
    """
    scores = values[:, columns] @ values.transpose(1, 2) / math.sqrt(values.shape[-1])
    return torch.log_softmax(scores.masked_fill(masked, -1e4), dim=-1)
