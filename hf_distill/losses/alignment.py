"""Log-probabilities of student and teacher over the same ids, so that each divergence is written once."""

import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits
from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs
from ..core.signals import Signals
from ..errors import DistillError

LOG_ZERO = -1e4  # stands for log(0): its exp is 0 in float32 and float64, and unlike -inf, 0 times it is 0


def align(
    student: Signals | Tensor, teacher: Signals | Tensor, temperature: float, sampled: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the log-probabilities of both models over the same ids, at one temperature.

    With a dense teacher: `log_softmax(logits[:, :V] / temperature)` of each model, V = min(V_s, V_t). Ids that only one
    (padded) vocabulary has are left out, and the others are renormalized. With a sparse teacher: its K ids and, for a
    top-k teacher, one more entry for the probability of all other ids.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        temperature: divides both logits.
        sampled: whether the caller's loss is unbiased with a sampled teacher, which stores nothing about ids that were
            not drawn.

    Returns:
        (student, teacher), each [T, V]; [T, K + 1] with a top-k teacher, [T, K] with a sampled teacher; in float32, or
        float64 if the student's logits are.

    Raises:
        DistillError: temperature is not positive, a sparse teacher was stored at another temperature, or a sampled
            teacher would bias the loss.
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
    """Check that a sparse teacher's probabilities were stored at the temperature of the loss.

    Raises:
        DistillError: they were stored at another temperature.
    """
    if teacher.temperature != temperature:
        raise DistillError(
            f"The teacher's probabilities were stored at temperature {teacher.temperature} and the loss has "
            f"temperature {temperature}: set temperature to {teacher.temperature}, or write the cache again."
        )


def _align_sparse(s: Tensor, teacher: SparseLogProbs, temperature: float, sampled: bool) -> tuple[Tensor, Tensor]:
    check_temperature(teacher, temperature)
    s = s[..., : teacher.vocab_size]
    if teacher.log_tail is None and not sampled:
        raise DistillError(
            "With a sampled teacher only forward_kl is unbiased: use forward_kl, or a cache of another kind (hidden, "
            "top_k)."
        )
    log_s = torch.log_softmax(s / temperature, dim=-1).gather(-1, teacher.ids)
    log_t = teacher.log_probs.to(s.dtype).clamp(min=LOG_ZERO)
    if teacher.log_tail is None or teacher.ids.shape[-1] == s.shape[-1]:
        return log_s, log_t
    # Padding slots of a row with fewer than K ids (log_prob = -inf) must not contribute.
    log_s = log_s.masked_fill(teacher.log_probs <= LOG_ZERO, LOG_ZERO)
    student_tail = (1 - log_s.exp().sum(-1, keepdim=True)).clamp(min=torch.finfo(s.dtype).eps).log()
    teacher_tail = teacher.log_tail[:, None].to(s.dtype).clamp(min=LOG_ZERO)
    return torch.cat([log_s, student_tail], -1), torch.cat([log_t, teacher_tail], -1)


def dense_logits(source: Signals | Tensor) -> Tensor:
    """Return the logits of a model over its full vocabulary, [T, V], in float32 or float64.

    Args:
        source: signals, or logits [T, V].

    Raises:
        DistillError: the signals hold no logits, or those of a sparse teacher or of one with another tokenizer.
    """
    if isinstance(source, Tensor):
        return DenseLogits(source).project()
    if isinstance(source.logits, AlignedLogits):
        raise DistillError(
            "The teacher has another tokenizer, and this loss compares the ids of one: use a loss on chunks "
            "(alm, projected_kl or uld)."
        )
    if not isinstance(source.logits, DenseLogits | LazyLogits):
        raise DistillError(
            "A sparse teacher has no logits over the full vocabulary: use a loss that reads sparse teachers, such as "
            "forward_kl, or a cache of kind hidden."
        )
    return source.logits.project()
