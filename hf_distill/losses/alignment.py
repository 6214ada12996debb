"""One shared support for student and teacher, so that each divergence is written once."""

import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs
from ..core.signals import Signals
from ..errors import DistillError

LOG_ZERO = -1e4  # log of no mass: exp of it is 0, and 0 times it is 0


def align(
    student: Signals | Tensor, teacher: Signals | Tensor, temperature: float, sampled: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models over one support, at one temperature.

    A dense teacher: `log_softmax(logits[:, :V] / temperature)` of each, V = min(V_student, V_teacher); padding rows
    that only one vocabulary has are left out and the rest renormalised. A sparse one: its K ids, and one more entry for
    all the mass outside them.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        temperature: divides both logits.
        sampled: whether the caller is right for a sampled teacher, which knows no mass outside its draws.

    Returns:
        (student, teacher), each [T, V], or [T, K + 1], or [T, K] for a sampled teacher; float32 or better.

    Raises:
        DistillError: temperature not positive; a sparse teacher stored at another temperature; a sampled one where it
            would be biased.
    """
    if not temperature > 0:
        raise DistillError(f"temperature is {temperature}; it must be a positive number")
    s = dense_logits(student)
    if isinstance(teacher, Signals) and isinstance(teacher.logits, SparseLogProbs):
        return _align_sparse(s, teacher.logits, temperature, sampled)
    t = dense_logits(teacher).detach()
    shared = min(s.shape[-1], t.shape[-1])
    return (
        torch.log_softmax(s[..., :shared] / temperature, dim=-1),
        torch.log_softmax(t[..., :shared].to(s.device) / temperature, dim=-1),
    )


def check_temperature(teacher: SparseLogProbs, temperature: float) -> None:
    """Refuse to tell probabilities at another temperature than the one at which they were stored.

    Raises:
        DistillError: it is another one.
    """
    if teacher.temperature != temperature:
        raise DistillError(
            f"The teacher's probabilities were stored at temperature {teacher.temperature} and are asked for at "
            f"{temperature}: set temperature to {teacher.temperature}."
        )


def _align_sparse(s: Tensor, teacher: SparseLogProbs, temperature: float, sampled: bool) -> tuple[Tensor, Tensor]:
    check_temperature(teacher, temperature)
    s = s[..., : teacher.vocab_size]
    if teacher.log_tail is None and not sampled:
        raise DistillError("A sampled teacher gives an unbiased forward_kl and no other divergence: use forward_kl.")
    log_s = torch.log_softmax(s / temperature, dim=-1).gather(-1, teacher.ids)
    log_t = teacher.log_probs.to(s.dtype).clamp(min=LOG_ZERO)
    if teacher.log_tail is None or teacher.ids.shape[-1] == s.shape[-1]:
        return log_s, log_t
    log_s = log_s.masked_fill(teacher.log_probs <= LOG_ZERO, LOG_ZERO)  # a row with fewer ids: not outside, not twice
    floor = torch.finfo(s.dtype).eps
    tail = (1 - log_s.exp().sum(-1, keepdim=True)).clamp(min=floor).log()
    return torch.cat([log_s, tail], -1), torch.cat(
        [log_t, teacher.log_tail[:, None].to(s.dtype).clamp(min=LOG_ZERO)], -1
    )


def dense_logits(source: Signals | Tensor) -> Tensor:
    """The logits of a model over its whole vocabulary, [T, V], in float32 or better.

    Raises:
        DistillError: the source is sparse.
    """
    if isinstance(source, Tensor):
        return DenseLogits(source).project()
    if not isinstance(source.logits, DenseLogits | LazyLogits):
        raise DistillError("A sparse teacher has no logits over the whole vocabulary.")
    return source.logits.project()
