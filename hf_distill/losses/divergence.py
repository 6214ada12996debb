"""Divergences between the two distributions over the next token, in nats per asked token."""

from torch import Tensor

from ..signals import Signals, Targets
from .registry import loss
from .support import align


@loss("forward_kl", needs=("logits",), paper="1503.02531")
def forward_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """KL(teacher || student): covers every mode of the teacher.

    sum_v p_t(v) * (log p_t(v) - log p_s(v)), p = softmax(logits / temperature) over the ids both models have

    Args:
        student: signals, or logits [T, V_s].
        teacher: signals, or logits [T, V_t].
        targets: not used.
        temperature: divides both logits. The distiller multiplies by its square (the mission of T^2: gradients that do
            not shrink as T grows); this function does not.

    Returns:
        [T] nats. 0 where the distributions are equal; for a one-hot teacher, the cross entropy with its label.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531.
    """
    s, t = align(student, teacher, temperature)
    return (t.exp() * (t - s)).sum(-1)
