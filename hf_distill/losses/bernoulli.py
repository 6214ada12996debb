"""Losses and metrics of multi-label classifiers, whose outputs are an independent Bernoulli for each of C labels.

p_c is the student's probability of label c and q_c the teacher's: sigmoid(logit / temperature). A target is a row.
"""

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from ..core.loss_kinds import BERNOULLIS
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from .alignment import dense_logits
from .analytic_gradients import BlockLogits
from .evaluation_metrics import LABELED, PREDICTED, TRUE_POSITIVES
from .registry import loss

_STUDENT_COUNTS = (LABELED, TRUE_POSITIVES, PREDICTED)
_TEACHER_COUNTS = (f"teacher_{TRUE_POSITIVES}", f"teacher_{PREDICTED}")
BERNOULLI_COUNTS = _STUDENT_COUNTS + _TEACHER_COUNTS
BERNOULLI_STUDENT_METRICS = ("measured", *_STUDENT_COUNTS)
BERNOULLI_PAIR_METRICS = ("kl", "agreement", *_TEACHER_COUNTS)


@loss("bernoulli_kl", compares=("logits",), outputs=BERNOULLIS)
def bernoulli_kl(
    student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None, *, temperature: float = 1.0
) -> Tensor:
    """Forward KL between the Bernoullis of all labels, KL(teacher || student), summed over the labels.

    sum_c q_c * log(q_c / p_c) + (1 - q_c) * log((1 - q_c) / (1 - p_c))

    Args:
        student: signals, or logits [T, C].
        teacher: signals, or logits [T, C]; no gradient reaches it.
        targets: not used.
        temperature: T, divides the logits of both models.

    Returns:
        [T] in nats; 0 where p = q.

    Raises:
        DistillError: temperature is not positive.
    """
    if not temperature > 0:
        raise DistillError(f"temperature is {temperature}; it must be a positive number")
    s = dense_logits(student) / temperature
    t = dense_logits(teacher).detach().to(s) / temperature
    yes, no = logsigmoid(t) - logsigmoid(s), logsigmoid(-t) - logsigmoid(-s)
    return (torch.sigmoid(t) * yes + torch.sigmoid(-t) * no).sum(-1)


@loss("binary_cross_entropy", compares=(), outputs=BERNOULLIS)
def binary_cross_entropy(student: Signals, teacher: Signals | None, targets: Targets) -> Tensor:
    """Binary cross entropy with the labels, averaged over the labels as transformers does.

    1/C * sum_c -y_c * log p_c - (1 - y_c) * log(1 - p_c)

    Args:
        student: signals with the student logits [T, C].
        teacher: not used.
        targets: T rows with labels [T, C] between 0 and 1.

    Returns:
        [T] in nats.
    """
    logits = dense_logits(student)
    return binary_cross_entropy_with_logits(logits, targets.labels.to(logits), reduction="none").mean(-1)


def bernoulli_metrics(student: BlockLogits, block: BlockLogits | None, labels: Tensor) -> dict[str, Tensor]:
    """Return the statistics of each row of a block: name -> [r].

    `kl` is that of the Bernoullis at T = 1 in nats, summed over the labels. `agreement` is the share of labels for
    which both probabilities are on the same side of 0.5. The others are numbers of labels: those that are given
    (above 0.5), those that a model predicts, and those that are both.

    Args:
        student: the student logits.
        block: student and teacher logits; None returns `BERNOULLI_STUDENT_METRICS` alone.
        labels: [r, C] between 0 and 1.
    """
    is_given = labels > 0.5
    metrics = {
        "measured": student.student.new_ones(len(student.student)),
        LABELED: is_given.sum(-1),
        **_count_predicted(student.student, is_given),
    }
    if block is None or block.teacher is None:
        return metrics
    agrees = (block.student > 0) == (block.teacher > 0)
    return metrics | {
        "kl": bernoulli_kl(block.student, block.teacher),
        "agreement": agrees.to(block.student.dtype).mean(-1),
        **{f"teacher_{name}": count for name, count in _count_predicted(block.teacher, is_given).items()},
    }


def _count_predicted(logits: Tensor, is_given: Tensor) -> dict[str, Tensor]:
    is_predicted = logits > 0
    return {TRUE_POSITIVES: (is_predicted & is_given).sum(-1), PREDICTED: is_predicted.sum(-1)}
