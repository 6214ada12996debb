"""One shared support for student and teacher, so that each divergence is written once."""

import torch
from torch import Tensor

from ..signals import Logits, Signals


def align(student: Signals | Tensor, teacher: Signals | Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both models over the ids that both have, at one temperature.

    Equals `log_softmax(logits[:, :V] / temperature)` of each, V = min(V_student, V_teacher): the padding rows that only
    one vocabulary has are left out and the rest renormalised.

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t]; no gradient reaches it.
        temperature: divides both logits.

    Returns:
        (student [T, V], teacher [T, V]), float32 or better.
    """
    s, t = _logits(student), _logits(teacher).detach()
    shared = min(s.shape[-1], t.shape[-1])
    return (
        torch.log_softmax(s[..., :shared] / temperature, dim=-1),
        torch.log_softmax(t[..., :shared].to(s.device) / temperature, dim=-1),
    )


def _logits(source: Signals | Tensor) -> Tensor:
    return (source.logits if isinstance(source, Signals) else Logits(source)).project()
