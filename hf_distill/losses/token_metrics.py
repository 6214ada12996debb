"""Statistics of each target token that are logged with the losses, and which metrics of an evaluation are better."""

import re

import torch
from torch import Tensor

from ..errors import DistillError
from .analytic_gradients import BlockLogits

STUDENT_METRICS = ("measured", "student_ce", "student_entropy", "accuracy")
PAIR_METRICS = ("kl", "agreement", "teacher_ce", "teacher_entropy")

_SMALLER_IS_BETTER = re.compile(
    r"(.+_)?(loss|kl|perplexity|bits_per_byte|teacher_mse)|(.+_)?(hard|soft)(_\w+)?_loss_.+"
)
_GREATER_IS_BETTER = re.compile(
    r"(.+_)?(agreement|mean_token_accuracy|accuracy|f1|pearson|spearman|exact_match|mean_iou|embedding_cosine)"
)
_NEITHER_IS_BETTER = re.compile(r"(.+_)?(student|teacher)_entropy")


def greater_is_better(metric: str) -> bool | None:
    """Return whether a greater value of a metric of an evaluation is better; None for an unknown metric.

    Args:
        metric: name of the metric, with or without `eval_` and the name of the data set.

    Raises:
        DistillError: neither a greater nor a smaller value of the metric is better.
    """
    name = metric.removeprefix("eval_")
    if _NEITHER_IS_BETTER.fullmatch(name):
        raise DistillError(
            f"metric_for_best_model is {metric!r}, and neither a greater nor a smaller value of it is better: use "
            "eval_kl, eval_agreement or eval_loss, or set greater_is_better."
        )
    if _SMALLER_IS_BETTER.fullmatch(name):
        return False
    return True if _GREATER_IS_BETTER.fullmatch(name) else None


def token_metrics(student: BlockLogits, block: BlockLogits | None) -> dict[str, Tensor]:
    """Return the statistics of each target token of a block at T = 1: name -> [r].

    `kl`, entropies and cross entropies are in nats; `measured`, `accuracy` and `agreement` (top-1) are 0 or 1.

    Args:
        student: the student logits over all ids of the student.
        block: student and teacher logits over the ids that both have; None returns `STUDENT_METRICS` alone.
    """
    z, p, lse = student.student_softmax()
    label_logit = z.gather(1, student.labels[:, None])
    top_logit = student.student.amax(-1, keepdim=True)
    metrics = {
        "measured": torch.ones_like(lse[:, 0]),
        "student_ce": (lse - label_logit)[:, 0],
        "student_entropy": lse[:, 0] - student.expectation(p, z),
        "accuracy": (student.student.gather(1, student.labels[:, None]) >= top_logit)[:, 0].to(z.dtype),
    }
    if block is None:
        return metrics
    teacher_values = block.teacher_full
    y, q, lse_t = block.teacher_softmax()
    z, _, lse = block.student_softmax()
    metrics["kl"] = block.expectation(q, torch.sub(y, z, out=block.new_buffer())) + (lse - lse_t)[:, 0]
    in_teacher_vocab = student.labels < teacher_values.shape[1]
    label_logit = teacher_values.gather(1, (student.labels * in_teacher_vocab)[:, None])
    is_shared = teacher_values.shape == block.teacher_softmax().logits.shape
    lse_full = lse_t if is_shared else torch.logsumexp(teacher_values, 1, keepdim=True)
    metrics["teacher_ce"] = torch.where(in_teacher_vocab, (lse_full - label_logit)[:, 0], torch.inf)
    metrics["teacher_entropy"] = lse_t[:, 0] - block.expectation(q, y)
    teacher_top = teacher_values.argmax(-1, keepdim=True)
    in_student_vocab = teacher_top < student.student.shape[1]
    agrees = student.student.gather(1, teacher_top * in_student_vocab) >= top_logit
    metrics["agreement"] = (agrees & in_student_vocab)[:, 0].to(z.dtype)
    return metrics
