"""Cross entropy with the labels: the hard term of the objective, without a teacher."""

import torch
from torch import Tensor

from ..core.options import FROM_0_TO_1
from ..core.signals import Signals
from ..core.targets import Targets
from .alignment import dense_logits
from .registry import loss


@loss("cross_entropy", compares=(), limits={"label_smoothing": FROM_0_TO_1})
def cross_entropy(
    student: Signals, teacher: Signals | None, targets: Targets, *, label_smoothing: float = 0.0
) -> Tensor:
    """Cross entropy with the labels: the next token, or the class.

    (1 - label_smoothing) * -log p(label) + label_smoothing * mean_v -log p(v)

    Args:
        student: signals with the student logits [T, V].
        teacher: not used.
        targets: T target tokens.
        label_smoothing: in [0, 1].

    Returns:
        [T] in nats, as `torch.nn.functional.cross_entropy(..., reduction="none")`.
    """
    return torch.nn.functional.cross_entropy(
        dense_logits(student), targets.labels, reduction="none", label_smoothing=label_smoothing
    )
