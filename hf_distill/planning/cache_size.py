"""What a cache of a recipe's teacher would take, and when it pays."""

from dataclasses import dataclass
from math import ceil, log2

from .model_stats import ModelStats

DRAWS, K = 12, 64
_ROW = 28  # bytes of an example beside its payload: its key, its counts, its place
# Measured on SmolLM2-135M-Instruct at T = 1 (benchmarks/results/cache.json), by which ids are scaled to other sizes.
_DISTINCT = 6.6  # ids among 12 draws
_KEPT = {"sampled": 0.92, "top_k": 0.61}  # bits an id takes of those that its number needs
_BESIDE = {"sampled": 3.2, "top_k": 88.0}  # bytes a token for counts and log-probabilities


@dataclass(frozen=True)
class CacheEstimate:
    """A kind of cache.

    kind:            as `hf-distill cache write --kind` says
    bytes_per_token: expected
    head:            bytes of the output head, which is stored once
    tells:           what a run can have of it; the cosine of its gradient with the whole one, as measured there
    """

    kind: str
    bytes_per_token: float
    supports: str
    head: int = 0


@dataclass(frozen=True)
class CachePlan:
    """Caches for a recipe.

    kinds:        what each takes
    saved:        share of a step's operations that is the teacher's forward, which a cache saves
    tokens:       of the run; None where the recipe counts epochs
    """

    kinds: list[CacheEstimate]
    saved: float
    tokens: int | None


def caches_of(
    teacher: ModelStats, length: int, layers: int, forward: float, training: float, tokens: int | None, head: int
) -> CachePlan:
    """Caches of a teacher.

    Args:
        teacher: the teacher.
        length: tokens of a row.
        layers: whose hidden states are stored beside the last.
        forward: FLOP a token, of the teacher.
        training: FLOP a token, of the student.
        tokens: of the run.
        head: bytes of the teacher's output head, as it is loaded.
    """
    kinds = kinds_of(teacher.vocab, teacher.hidden, length, layers, head=head)
    return CachePlan(kinds, forward / (forward + training), tokens)


def kinds_of(
    vocab: int, hidden: int | None, length: float, layers: int = 0, distinct: float = _DISTINCT, head: int = 0
) -> list[CacheEstimate]:
    """What each kind of cache takes.

    Args:
        vocab: V of the teacher.
        hidden: H of it; None: its head is no plain layer, and its hidden states cannot be stored.
        length: tokens of a row.
        layers: whose hidden states are stored beside the last.
        distinct: ids among the draws of a token, expected.
        head: bytes of the output head.
    """
    row, bits = _ROW / length, ceil(log2(vocab))
    sparse = {
        name: count * bits * _KEPT[name] / 8 + _BESIDE[name] + row
        for name, count in (("sampled", distinct), ("top_k", min(K, vocab)))
    }
    kinds = [
        CacheEstimate(
            "sampled",
            sparse["sampled"],
            f"forward KL without bias, by {DRAWS} draws, at one temperature; gradient's cosine 0.999 at T = 1; above, "
            "larger and noisier (hf-distill inspect)",
        ),
        CacheEstimate(
            "top_k",
            sparse["top_k"],
            f"losses on the {K} likeliest ids and the rest's mass, at one temperature; cosine 0.997",
        ),
    ]
    if hidden is None:
        return kinds
    exact = "all losses on logits at every temperature, equal to the teacher's up to bf16"
    return [CacheEstimate("hidden", 2 * hidden * (1 + layers) + row, exact, head), *kinds]
