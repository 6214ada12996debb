"""Losses and metrics of models whose outputs are D real numbers for each row: regression, and scores of rerankers.

They have no temperature, because the outputs are no logits of a distribution. A target is a row.
"""

from torch import Tensor

from ..core.loss_kinds import REAL_VALUES
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from .alignment import dense_logits
from .analytic_gradients import BlockLogits
from .registry import loss

REAL_VALUE_PREDICTIONS = ("prediction", "teacher_prediction")
REAL_VALUE_STUDENT_METRICS = ("measured", "prediction")
REAL_VALUE_PAIR_METRICS = ("teacher_mse", "teacher_prediction")


@loss("mse", compares=("logits",), outputs=REAL_VALUES)
def mse(student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None) -> Tensor:
    """Squared error to the outputs of the teacher, averaged over the outputs of a row.

    1/D * sum_d (s_d - t_d)^2

    Args:
        student: signals, or outputs [T, D].
        teacher: signals, or outputs [T, D]; no gradient reaches it.
        targets: not used.

    Returns:
        [T], in the squared unit of the outputs.
    """
    s = dense_logits(student)
    return (s - dense_logits(teacher).detach().to(s)).square().mean(-1)


@loss("margin_mse", compares=("logits",), paper="2010.02666", outputs=REAL_VALUES, rows_together=2)
def margin_mse(student: Signals | Tensor, teacher: Signals | Tensor, targets: Targets | None = None) -> Tensor:
    """Squared error between the margins of student and teacher, for pairs of consecutive rows of a batch.

    ((s_0 - s_1) - (t_0 - t_1))^2, for the rows 0 and 1, 2 and 3, ... of a batch

    The first row of a pair is a query with its positive passage, the second the same query with a negative passage.
    Both rows have the value of their pair, so that the mean over rows is the mean over pairs.

    Args:
        student: signals, or scores [T, 1].
        teacher: signals, or scores [T, 1]; no gradient reaches it.
        targets: not used.

    Returns:
        [T], in the squared unit of the scores.

    Raises:
        DistillError: the number of rows is odd, or a row has several outputs.

    Source: Hofstaetter et al., arXiv 2010.02666.
    """
    s = dense_logits(student)
    t = dense_logits(teacher).detach().to(s)
    if s.shape[1] != 1:
        raise DistillError(f"margin_mse compares one score for each row, and the models have {s.shape[1]}: use mse.")
    if len(s) % 2:
        raise DistillError(
            f"margin_mse compares pairs of consecutive rows, and a batch has {len(s)} rows: use batch sizes and data "
            "sets with an even number of rows, a positive followed by its negative."
        )
    margin_s, margin_t = (scores[0::2, 0] - scores[1::2, 0] for scores in (s, t))
    return (margin_s - margin_t).square().repeat_interleave(2)


@loss("squared_error", compares=(), outputs=REAL_VALUES)
def squared_error(student: Signals, teacher: Signals | None, targets: Targets) -> Tensor:
    """Squared error to the labels, averaged over the outputs of a row as transformers does.

    1/D * sum_d (s_d - y_d)^2

    Args:
        student: signals with the outputs [T, D].
        teacher: not used.
        targets: T rows with labels [T] or [T, D].

    Returns:
        [T], in the squared unit of the labels.
    """
    outputs = dense_logits(student)
    return (outputs - targets.labels.to(outputs).reshape(outputs.shape)).square().mean(-1)


def real_value_metrics(student: BlockLogits, block: BlockLogits | None) -> dict[str, Tensor]:
    """Return the statistics of each row of a block: name -> [r]; `teacher_mse` is the loss `mse`.

    `prediction` and `teacher_prediction` are the first of the outputs, which correlations are computed from.

    Args:
        student: the student's outputs.
        block: outputs of student and teacher; None returns `REAL_VALUE_STUDENT_METRICS` alone.
    """
    metrics = {"measured": student.student.new_ones(len(student.student)), "prediction": student.student[:, 0]}
    if block is None or block.teacher is None:
        return metrics
    return metrics | {
        "teacher_mse": mse(block.student, block.teacher),
        "teacher_prediction": block.teacher[:, 0],
    }
