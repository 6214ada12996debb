"""Draws from a teacher's distribution over a large vocabulary, in two passes over it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, compute_dtype, cumulative_sum

_BLOCK = 256  # ids whose mass is summed first
_WORKSPACE = 64 * 2**20  # bytes of logits that are made at a time
_CACHED = 3 * 2**20  # bytes of logits that a CPU's cache holds


def blocks_of(source: LazyLogits | DenseLogits) -> Iterator[tuple[slice, Tensor]]:
    """(rows, logits [r, V]) of all asked tokens, a few at a time; they may be written over."""
    like = source.hidden if isinstance(source, LazyLogits) else source.values
    row = 4 * source.vocab_size
    size = max(1, min(len(like), _WORKSPACE // row))
    each = size if like.is_cuda else max(1, _CACHED // row)
    weight = source.weight if isinstance(source, LazyLogits) else like
    buffer = like.new_empty(size, source.vocab_size, dtype=compute_dtype(like, weight))
    for start in range(0, len(like), size):
        chunk = source.project(slice(start, start + size), out=buffer)
        for first in range(0, len(chunk), each):
            block = chunk[first : first + each]
            yield slice(start + first, start + first + len(block)), block


def systematic_points(count: int, draws: int, generator: torch.Generator) -> Tensor:
    """Where to draw: one random number for each token, and the others at equal distances from it (Madow 1949).

    An id of probability p is drawn K p times, rounded up or down: K p on average, as by independent draws, with less
    variance. The expected square of q - p, for q the share of the draws, is f (1 - f) / K^2 with f the fraction of K p;
    that of independent draws is p (1 - p) / K.

    Args:
        count: T tokens.
        draws: K of each.
        generator: of the random numbers.

    Returns:
        [T, K] in [0, 1), ascending, float64.
    """
    start = torch.rand(count, 1, generator=generator, dtype=torch.float64)
    return ((start + torch.arange(draws)) / draws).clamp_(max=1 - 2**-53)  # where the sum was rounded up


def sample_by_inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Ids drawn from softmax(logits), by the inverse of its running sum.

    The sum is taken over blocks of ids first, and inside the blocks that were hit then.

    Args:
        logits: [r, V]; written over.
        uniform: [r, K] numbers in [0, 1), float64.

    Returns:
        ids [r, K] in ascending order, and their log-probabilities [r, K].
    """
    vocab = logits.shape[1]
    mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    whole = vocab // _BLOCK * _BLOCK
    sums = [mass[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)] if whole else []
    sums += [mass[:, whole:].sum(-1, keepdim=True)] if whole < vocab else []
    ends = cumulative_sum(torch.cat(sums, 1).double())
    goal = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, goal, right=True).clamp(max=ends.shape[1] - 1)
    goal = goal - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    ids = block[..., None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = mass.gather(1, ids.clamp(max=vocab - 1).flatten(1)).view_as(ids).masked_fill_(ids >= vocab, 0)
    running = cumulative_sum(inside.double())
    # Never an id without mass: not beyond the block's last one that has some, wherever rounding put the goal.
    goal = torch.minimum(goal.clamp(min=0), running[..., -1] * (1 - 1e-12))
    found = block * _BLOCK + torch.searchsorted(running, goal[..., None], right=True)[..., 0]
    found = found.sort(-1).values
    return found, mass.gather(1, found).double().log() - ends[:, -1:].log()
