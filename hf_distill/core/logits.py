"""Sources of logits: held, made from hidden states chunk by chunk, or sparse. Shape letters: see `targets.py`."""

import builtins
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a tensor has it, else float32: losses are never computed in less."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


@dataclass(frozen=True)
class DenseLogits:
    """A source of logits that holds them: `values` [T, V]."""

    values: Tensor

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.values.shape[-1]

    def detach(self) -> "DenseLogits":
        """The same without its graph."""
        return DenseLogits(self.values.detach())

    def project(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """The logits of some asked tokens, [t, V], in float32 or better; in the buffer `out` if given."""
        chunk = self.values[rows]
        return chunk.to(compute_dtype(chunk)) if out is None else out[: len(chunk)].copy_(chunk)


_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitScaling:
    """What follows the head in some models: `softcap * tanh(scale * z / softcap)`, or `scale * z` without a cap.

    scale:   Cohere's `logit_scale`, one over Granite's `logits_scaling`
    softcap: Gemma's `final_logit_softcapping`, RecurrentGemma's `logits_soft_cap`, xLSTM's `output_logit_soft_cap`
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: Any) -> "LogitScaling":
        """Read it from a model's config: what it declares; `output_head` measures whether the model does it."""
        config = config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        caps = (getattr(config, name, None) for name in _SOFTCAP_NAMES)
        return cls(scale, next((cap for cap in caps if cap), None))

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def derivative(self, logits: Tensor) -> Tensor | float:
        """The derivative, by the logits that `apply_` returned."""
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True)
class LazyLogits:
    """A source of logits that makes them: `scaling(hidden @ weight.T + bias)`, chunk by chunk, never whole.

    hidden [T, H], weight [V, H], bias [V] or None
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scaling: LogitScaling = LogitScaling()

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    def detach(self) -> "LazyLogits":
        """The same without its graph: aliases, which outlive a wrapper that takes gathered weights back."""
        bias = None if self.bias is None else self.bias.detach()
        return LazyLogits(self.hidden.detach(), self.weight.detach(), bias, self.scaling)

    def project(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """The logits of some asked tokens, [t, V], in float32 or better, accumulated in it too.

        Args:
            rows: which of the asked tokens.
            out: a buffer [at least t, V] to be written.
        """
        hidden = self.hidden[rows]
        if out is None:
            out = hidden.new_empty(len(hidden), self.vocab_size, dtype=compute_dtype(hidden, self.weight))
        out = project_matmul(hidden, self.weight, out[: len(hidden)])
        if self.bias is not None:
            out.add_(self.bias)
        return self.scaling.apply_(out)


_TILE = 4096  # rows of the head that are held in float32 at a time


def project_matmul(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`hidden @ weight.T` into `out` [t, V], in the precision of `out` whatever the dtype of the factors."""
    if hidden.dtype == weight.dtype == out.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    if hidden.is_cuda and hidden.dtype == weight.dtype and hidden.dtype.itemsize < out.dtype.itemsize:
        return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    hidden = hidden.to(out.dtype)
    for v in range(0, len(weight), _TILE):
        torch.mm(hidden, weight[v : v + _TILE].to(out.dtype).t(), out=out[:, v : v + _TILE])
    return out


@dataclass(frozen=True)
class SparseLogProbs:
    """What a teacher said about some ids of each asked token.

    ids:         [T, K]
    log_probs:   [T, K], -inf where a row has fewer; of sampled teachers: logs of the draws' unbiased weights
    log_tail:    [T] log of the mass outside `ids`; None for a sampled teacher
    temperature: at which the probabilities were taken
    expected:    [T] of a sampled teacher: sum over the draws of weight * its own log-probability, with which the value
                 of forward KL has no bias; None: unknown, and the value is KL(weights || student)
    vocab_size:  V of the teacher, of whose ids these are some; None: that of the student
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None
    temperature: float = 1.0
    negative_entropy: Tensor | None = None
    vocab_size: int | None = None

    def slice(self, rows: builtins.slice) -> "SparseLogProbs":
        """The same for some of the asked tokens."""
        tail, expected = (None if t is None else t[rows] for t in (self.log_tail, self.negative_entropy))
        return SparseLogProbs(self.ids[rows], self.log_probs[rows], tail, self.temperature, expected, self.vocab_size)


@dataclass(frozen=True)
class MultiTeacherLogits:
    """What several teachers said of the same asked tokens, by their names; losses say which one they follow."""

    sources: Mapping[str, DenseLogits | LazyLogits | SparseLogProbs]


def named_sources(
    source: DenseLogits | LazyLogits | SparseLogProbs | MultiTeacherLogits | None,
) -> dict[str | None, DenseLogits | LazyLogits | SparseLogProbs]:
    """The sources of one, several or no teachers; the name of the only one is None."""
    if isinstance(source, MultiTeacherLogits):
        return dict(source.sources.items())
    return {} if source is None else {None: source}


def grad_hidden_matmul(gradient: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """`gradient @ weight` added to `out` [t, H], in the precision of `out`."""
    if weight.dtype == out.dtype:
        return out.addmm_(gradient, weight)
    for v in range(0, len(weight), _TILE):
        out.addmm_(gradient[:, v : v + _TILE], weight[v : v + _TILE].to(out.dtype))
    return out


def cumulative_sum(values: Tensor) -> Tensor:
    """`values.cumsum(-1)`; where deterministic algorithms are required, by adding at doubling distances on a GPU.

    PyTorch has no deterministic cumulative sum of floating-point numbers on CUDA and raises an error there.
    """
    if not (values.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return values.cumsum(-1)
    return sum_at_doubling_distances(values)


def sum_at_doubling_distances(values: Tensor) -> Tensor:
    """The cumulative sum over the last dimension, in log2 of its length additions."""
    distance = 1
    while distance < values.shape[-1]:
        values = values + torch.nn.functional.pad(values[..., :-distance], (distance, 0))
        distance *= 2
    return values
