"""Representations of logits: dense, lazy (hidden states and output head) or sparse. Shape letters: see `targets.py`."""

import builtins
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from ..errors import DistillError
from .matmul import project_matmul

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return float64 if a tensor has it, else float32; losses are never computed in a lower precision."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def enabled_autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype of the autocast that is enabled for a device; None if there is none."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device; a copy from the host to a GPU is from pinned memory and does not wait for it."""
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(*tensors: Tensor) -> list[np.ndarray]:
    """Return integer tensors as int64 arrays on the host, in one copy, because the host waits for each."""
    flat = torch.cat([tensor.reshape(-1).long() for tensor in tensors]).cpu().numpy()
    ends = np.cumsum([tensor.numel() for tensor in tensors])[:-1]
    return [part.reshape(tensor.shape) for part, tensor in zip(np.split(flat, ends), tensors, strict=True)]


@dataclass(frozen=True)
class DenseLogits:
    """Materialized logits: `values` [T, V]."""

    values: Tensor

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.values.shape[-1]

    def detach(self) -> "DenseLogits":
        """Return the logits without their graph."""
        return DenseLogits(self.values.detach())

    def project(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Return the logits of some target tokens, [t, V], in float32 or float64.

        Args:
            rows: target tokens.
            out: buffer [at least t, V] that is written and returned; None allocates one.
        """
        chunk = self.values[rows]
        return chunk.to(compute_dtype(chunk)) if out is None else out[: len(chunk)].copy_(chunk)

    def head_output(self, rows: slice, out: Tensor | None) -> Tensor:
        """Return the logits of some target tokens, [t, V], as they are; `out` is not used."""
        return self.values[rows]


RESHARDED_HEAD = (
    "FSDP2 frees the weight of an output head after its model's forward (reshard_after_forward), and the loss reads it "
    "afterwards. Wrap the model itself with fully_shard(model, reshard_after_forward=False) and its output head not "
    "separately; the decoder layers may be resharded. A teacher that is given by its path with fsdp=True "
    "is wrapped in this way."
)
_SOFTCAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class LogitScaling:
    """Scale and soft cap after the output head: `softcap * tanh(scale * z / softcap)`, or `scale * z` without a cap.

    scale:   Cohere's `logit_scale`, one over Granite's `logits_scaling`
    softcap: Gemma's `final_logit_softcapping`, RecurrentGemma's `logits_soft_cap`, xLSTM's `output_logit_soft_cap`
    """

    scale: float = 1.0
    softcap: float | None = None

    @classmethod
    def of(cls, config: "PretrainedConfig") -> "LogitScaling":
        """Read the scaling that a model's config declares; `output_head` measures whether the model applies it."""
        config = config.get_text_config()
        scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
        caps = (getattr(config, name, None) for name in _SOFTCAP_NAMES)
        return cls(scale, next((cap for cap in caps if cap), None))

    def apply_(self, logits: Tensor) -> Tensor:
        """Apply the scaling in place and return the logits.

        Args:
            logits: [t, V] output of the head.
        """
        if self.scale != 1.0:
            logits.mul_(self.scale)
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def derivative(self, logits: Tensor) -> Tensor | float:
        """Return the derivative of the scaling with respect to the output of the head.

        Args:
            logits: [t, V], as `apply_` returned them.

        Returns:
            [t, V], or one number without a soft cap.
        """
        if self.softcap is None:
            return self.scale
        return (logits / self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


@dataclass(frozen=True)
class LazyLogits:
    """Logits that are computed chunk by chunk: `scaling(hidden @ weight.T + bias)`.

    hidden:        [T, H] input of the output head
    weight:        [V, H] of the output head
    bias:          [V] of the output head, or None
    scaling:       scale and soft cap after the head
    master_weight: [V, H] parameter in float32 that autocast cast to `weight`; the fused loss gives it its gradient in
                   float32, without rounding to the dtype of `weight`. None: `weight` gets the gradient
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scaling: LogitScaling = LogitScaling()
    master_weight: Tensor | None = None

    @classmethod
    def of_head(
        cls, hidden: Tensor, weight: Tensor, bias: Tensor | None = None, scaling: LogitScaling = LogitScaling()
    ) -> "LazyLogits":
        """Return the logits of a linear output head, with the casts of an enabled autocast.

        Args:
            hidden: [T, H] input of the output head.
            weight: [V, H], its parameter.
            bias: [V], its parameter, or None.
            scaling: scale and soft cap after the head.
        """
        dtype = enabled_autocast_dtype(hidden.device)
        if dtype is None:
            return cls(hidden, weight, bias, scaling)
        hidden, cast = (t if t.dtype == torch.float64 else t.to(dtype) for t in (hidden, weight))
        bias = bias if bias is None or bias.dtype == torch.float64 else bias.to(dtype)
        is_cast = cast.dtype.itemsize < weight.dtype.itemsize
        return cls(hidden, cast, bias, scaling, weight if is_cast else None)

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.weight.shape[0]

    def detach(self) -> "LazyLogits":
        """Return the logits without their graph; the aliases stay valid after a wrapper frees its gathered weights."""
        bias = None if self.bias is None else self.bias.detach()
        return LazyLogits(self.hidden.detach(), self.weight.detach(), bias, self.scaling)

    def check_weight(self) -> None:
        """Check that the memory of the weight was not freed after the forward of its model.

        Raises:
            DistillError: it was; reading it on a GPU would be an illegal memory access.
        """
        if self.weight.untyped_storage().nbytes() < self.weight.numel() * self.weight.element_size():
            raise DistillError(RESHARDED_HEAD)

    def project(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """Return the logits of some target tokens, [t, V], computed and accumulated in float32 or float64.

        Args:
            rows: target tokens.
            out: buffer [at least t, V] that is written and returned; None allocates one.

        Raises:
            DistillError: the memory of the weight was freed after the forward of its model.
        """
        out = self.head_output(rows, out)
        if self.bias is not None:
            out.add_(self.bias)
        return self.scaling.apply_(out)

    def head_output(self, rows: slice, out: Tensor | None) -> Tensor:
        """Return `hidden @ weight.T` of some target tokens, [t, V], to which bias and scaling are not applied yet.

        Args:
            rows: target tokens.
            out: buffer [at least t, V] that is written and returned; None allocates one.

        Raises:
            DistillError: the memory of the weight was freed after the forward of its model.
        """
        self.check_weight()
        hidden = self.hidden[rows]
        if out is None:
            out = hidden.new_empty(len(hidden), self.vocab_size, dtype=compute_dtype(hidden, self.weight))
        return project_matmul(hidden, self.weight, out[: len(hidden)])


@dataclass(frozen=True)
class SparseLogProbs:
    """Log-probabilities of a teacher for K ids of each target token.

    ids:              [T, K]
    log_probs:        [T, K], -inf in padding slots; of a sampled teacher: logs of the unbiased weights of the draws
    log_tail:         [T] log of the probability of all other ids; None for a sampled teacher
    temperature:      temperature of the probabilities
    negative_entropy: [T] of a sampled teacher: sum over the draws of weight * log-probability, with which the value of
                      forward KL is unbiased; None if unknown, and the value is KL(weights || student)
    vocab_size:       V of the teacher; None if it is that of the student
    label_log_probs:  [T] log-probability of the label at temperature 1, which may be none of the K ids; NaN if unknown;
                      None if the teacher returns none
    """

    ids: Tensor
    log_probs: Tensor
    log_tail: Tensor | None
    temperature: float = 1.0
    negative_entropy: Tensor | None = None
    vocab_size: int | None = None
    label_log_probs: Tensor | None = None

    def slice(self, rows: builtins.slice | Tensor) -> "SparseLogProbs":
        """Return the log-probabilities of some of the target tokens."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "SparseLogProbs":
        """Return the log-probabilities on a device."""
        return self._map(lambda tensor: upload(tensor, device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "SparseLogProbs":
        """Return the log-probabilities with a function applied to each tensor."""
        values: dict[str, Any] = {k: function(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()}
        return SparseLogProbs(**values)

    def without_ids_from(self, vocab_size: int) -> "SparseLogProbs":
        """Remove the ids of the padded part of the teacher's vocabulary, which the student does not have.

        The probabilities of a top-k teacher are normalized again; the slots become padding slots.

        Args:
            vocab_size: V of the student.
        """
        removed = self.ids >= vocab_size
        if not removed.any():
            return self
        log_probs, log_tail = self.log_probs, self.log_tail
        if log_tail is not None:
            mass = torch.where(removed, log_probs.exp(), 0).sum(-1, keepdim=True)
            log_remaining = torch.log1p(-mass.clamp(max=1 - 1e-6))
            log_probs, log_tail = log_probs - log_remaining, log_tail - log_remaining[:, 0]
        ids, log_probs = self.ids.masked_fill(removed, 0), log_probs.masked_fill(removed, -math.inf)
        return replace(self, ids=ids, log_probs=log_probs, log_tail=log_tail)


TokenLogits = TypeVar("TokenLogits", bound=DenseLogits | LazyLogits | SparseLogProbs)


def take_rows(logits: TokenLogits, rows: slice | Tensor) -> TokenLogits:
    """Return the logits of some of the tokens."""
    selected: DenseLogits | LazyLogits | SparseLogProbs
    match logits:
        case LazyLogits():
            selected = replace(logits, hidden=logits.hidden[rows])
        case SparseLogProbs():
            selected = logits.slice(rows)
        case _:
            selected = DenseLogits(logits.values[rows])
    return cast(TokenLogits, selected)


def cumulative_sum(values: Tensor) -> Tensor:
    """Return `values.cumsum(-1)`, on any device also with deterministic algorithms.

    PyTorch has no deterministic cumulative sum of floating-point numbers on CUDA and raises an error there.
    """
    return sum_at_doubling_distances(values) if torch.are_deterministic_algorithms_enabled() else values.cumsum(-1)


def sum_at_doubling_distances(values: Tensor) -> Tensor:
    """Return the cumulative sum over the last dimension of length n, with log2(n) additions of shifted tensors."""
    distance = 1
    while distance < values.shape[-1]:
        values = values + torch.nn.functional.pad(values[..., :-distance], (distance, 0))
        distance *= 2
    return values
