"""Samples from a teacher's distribution over a large vocabulary, in two passes over the logits."""

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, compute_dtype, cumulative_sum

_BLOCK_IDS = 256  # ids whose probabilities are summed in the first pass
_WORKSPACE_BYTES = 64 * 2**20  # of logits that are materialized at a time
_CPU_CACHE_BYTES = 3 * 2**20  # of logits that fit in the cache of a CPU


def blocks_of(source: LazyLogits | DenseLogits) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits [r, V]) of all target tokens in blocks of a few tokens; callers may overwrite the logits."""
    like = source.hidden if isinstance(source, LazyLogits) else source.values
    row_bytes = 4 * source.vocab_size
    size = max(1, min(len(like), _WORKSPACE_BYTES // row_bytes))
    block_rows = size if like.is_cuda else max(1, _CPU_CACHE_BYTES // row_bytes)
    weight = source.weight if isinstance(source, LazyLogits) else like
    buffer = like.new_empty(size, source.vocab_size, dtype=compute_dtype(like, weight))
    for start in range(0, len(like), size):
        chunk = source.project(slice(start, start + size), out=buffer)
        for first in range(0, len(chunk), block_rows):
            block = chunk[first : first + block_rows]
            yield slice(start + first, start + first + len(block)), block


def systematic_points(tokens: int, samples_per_token: int, generator: torch.Generator) -> Tensor:
    """Return points for systematic sampling: one random offset per token, then equal distances (Madow 1949).

    An id of probability q is sampled K q times, rounded up or down: K q on average, as with independent samples, but
    with less variance. For e the share of the samples, the expected square of e - q is f (1 - f) / K^2, where f is the
    fractional part of K q; for independent samples it is q (1 - q) / K.

    Args:
        tokens: T.
        samples_per_token: K.
        generator: random generator of the offsets.

    Returns:
        [T, K] points in [0, 1), ascending, float64.
    """
    offset = torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    points = (offset + torch.arange(samples_per_token)) / samples_per_token
    return points.clamp_(max=1 - 2**-53)  # rounding can give 1.0


def sample_by_inverse_cdf(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample ids from softmax(logits) by the inverse of the cumulative distribution.

    The first pass sums the probabilities of blocks of ids; the second pass sums only inside the sampled blocks.

    Args:
        logits: [r, V]; they are overwritten.
        uniform: [r, K] points in [0, 1), float64.

    Returns:
        ids [r, K] in ascending order, and their log-probabilities [r, K].
    """
    vocab = logits.shape[1]
    mass = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
    full_ids = vocab // _BLOCK_IDS * _BLOCK_IDS  # ids in full blocks
    sums = [mass[:, :full_ids].unflatten(1, (-1, _BLOCK_IDS)).sum(-1)] if full_ids else []
    sums += [mass[:, full_ids:].sum(-1, keepdim=True)] if full_ids < vocab else []
    ends = cumulative_sum(torch.cat(sums, 1).double())
    goal = uniform * ends[:, -1:]
    block = torch.searchsorted(ends, goal, right=True).clamp(max=ends.shape[1] - 1)
    goal = goal - torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    ids = block[..., None] * _BLOCK_IDS + torch.arange(_BLOCK_IDS, device=block.device)
    inside = mass.gather(1, ids.clamp(max=vocab - 1).flatten(1)).view_as(ids).masked_fill_(ids >= vocab, 0)
    running = cumulative_sum(inside.double())
    # Rounding must not move the goal beyond the last id of the block that has mass.
    goal = torch.minimum(goal.clamp(min=0), running[..., -1] * (1 - 1e-12))
    sampled_ids = block * _BLOCK_IDS + torch.searchsorted(running, goal[..., None], right=True)[..., 0]
    sampled_ids = sampled_ids.sort(-1).values
    return sampled_ids, mass.gather(1, sampled_ids).double().log() - ends[:, -1:].log()
