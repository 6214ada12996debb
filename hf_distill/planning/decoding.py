"""Memory that generating a token reads, which bounds the speed of decoding."""

from dataclasses import dataclass

from .model_stats import ModelStats

_BYTES = 2  # of a number in bf16, in which both models are compared


@dataclass(frozen=True)
class Decoding:
    """Memory that is read to generate one token of one sequence, in bytes, with weights and KV cache in bf16.

    weights:  weights of the layers that a token passes, and of the output head
    kv_cache: keys and values of one token of the context
    """

    weights: int
    kv_cache: int

    @classmethod
    def of(cls, stats: ModelStats) -> "Decoding":
        """Count what a model reads. Sliding windows are not counted: their layers read less of a long context."""
        experts = round(stats.experts * stats.active)
        cache = 2 * stats.depth * stats.kv_heads * stats.head_dim
        return cls(_BYTES * (stats.linear_weights + experts + stats.head), _BYTES * cache)

    def bytes_at(self, context: int) -> int:
        """Return the bytes that a token after a context of so many tokens reads."""
        return self.weights + context * self.kv_cache

    def speed_up(self, other: "Decoding", context: int) -> float:
        """Return how many times as fast as another model this one decodes, where memory bandwidth is the limit."""
        return other.bytes_at(context) / self.bytes_at(context)
