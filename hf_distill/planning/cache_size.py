"""Estimated size of a teacher cache for each kind of cache, and the share of a step's FLOP that a cache saves."""

from dataclasses import dataclass
from math import ceil, log2

from ..core.defaults import SAMPLES_PER_TOKEN, TOP_K_IDS
from .model_stats import ModelStats

_BYTES_PER_EXAMPLE = 28  # besides the payload: key, counts and offset
# Measured on SmolLM2-135M-Instruct at T = 1 (benchmarks/results/cache.json). The bytes of ids are scaled to the
# vocabulary size of other models.
_DISTINCT_IDS = 6.6  # distinct ids among 12 draws
_COMPRESSION = {"sampled": 0.92, "top_k": 0.61}  # compressed bits of an id / ceil(log2(vocabulary size))
_VALUE_BYTES_PER_TOKEN = {"sampled": 3.2, "top_k": 88.0}  # counts and log-probabilities


@dataclass(frozen=True)
class CacheEstimate:
    """Estimated size of one kind of teacher cache.

    kind:            the value of `hf-distill cache write --kind`
    bytes_per_token: expected bytes per token
    supports:        which losses and temperatures it supports, and the measured cosine between its gradient and the
                     exact one
    head:            bytes of the output head, which is stored once
    """

    kind: str
    bytes_per_token: float
    supports: str
    head: int = 0


@dataclass(frozen=True)
class CachePlan:
    """Teacher caches for a recipe.

    kinds:  the estimate of each kind
    saved:  share of a step's FLOP that the teacher's forward takes, which a cache saves
    tokens: tokens of the run; None where the recipe counts epochs
    """

    kinds: list[CacheEstimate]
    saved: float
    tokens: int | None


def estimate_caches(
    teacher: ModelStats, length: int, layers: int, forward: float, training: float, tokens: int | None, head: int
) -> CachePlan:
    """Estimate the caches of a teacher.

    Args:
        teacher: the teacher.
        length: tokens of a row.
        layers: number of layers whose hidden states are stored in addition to the last.
        forward: FLOP per token of the teacher's forward.
        training: FLOP per token of the student's training.
        tokens: tokens of the run; None where it is unknown.
        head: bytes of the teacher's output head in the dtype in which it is loaded.
    """
    kinds = kinds_of(teacher.vocab, teacher.hidden, length, layers, head=head)
    return CachePlan(kinds, forward / (forward + training), tokens)


def kinds_of(
    vocab: int, hidden: int | None, length: float, layers: int = 0, distinct: float = _DISTINCT_IDS, head: int = 0
) -> list[CacheEstimate]:
    """Estimate each kind of cache.

    Args:
        vocab: V of the teacher.
        hidden: H of the teacher; None where its output head is no linear layer, so hidden states cannot be
            stored.
        length: tokens of a row.
        layers: number of layers whose hidden states are stored in addition to the last.
        distinct: expected number of distinct ids among the draws of a token.
        head: bytes of the output head.
    """
    example, bits = _BYTES_PER_EXAMPLE / length, ceil(log2(vocab))
    sparse = {
        name: count * bits * _COMPRESSION[name] / 8 + _VALUE_BYTES_PER_TOKEN[name] + example
        for name, count in (("sampled", distinct), ("top_k", min(TOP_K_IDS, vocab)))
    }
    kinds = [
        CacheEstimate(
            "sampled",
            sparse["sampled"],
            f"an unbiased estimate of forward KL from {SAMPLES_PER_TOKEN} draws per token, at one temperature; cosine "
            "of its gradient with the exact one: 0.999 at T = 1; a higher temperature makes the cache larger and the "
            "gradient noisier (see `hf-distill inspect`)",
        ),
        CacheEstimate(
            "top_k",
            sparse["top_k"],
            f"losses on the {TOP_K_IDS} most likely ids and the remaining mass, at one temperature; cosine of its "
            "gradient with the exact one: 0.997",
        ),
    ]
    if hidden is None:
        return kinds
    exact = "all losses on logits at every temperature; equal to the teacher up to bf16"
    return [CacheEstimate("hidden", 2 * hidden * (1 + layers) + example, exact, head), *kinds]
