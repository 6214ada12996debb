"""What is measured of a block of asked tokens beside the losses: at T = 1, from softmaxes that the losses use too."""

import re

import torch
from torch import Tensor

from ..errors import DistillError
from .analytic_gradients import LogitPair

STUDENT_METRICS = ("measured", "student_ce", "student_entropy", "accuracy")
PAIR_METRICS = ("kl", "agreement", "teacher_ce", "teacher_entropy")

_SMALLER_IS_BETTER = re.compile(r"(.+_)?(loss|kl|perplexity)|(.+_)?(hard|soft)(_\w+)?_loss_.+")
_GREATER_IS_BETTER = re.compile(r"(.+_)?(agreement|mean_token_accuracy)")
_NEITHER_IS_BETTER = re.compile(r"(.+_)?(student|teacher)_entropy")


def greater_is_better(metric: str) -> bool | None:
    """Whether the best checkpoint has the greatest value of a metric of an evaluation; None: of an unknown metric.

    Args:
        metric: its name, with or without `eval_` and the name of the data set.

    Raises:
        DistillError: a metric that says nothing about how good a student is.
    """
    name = metric.removeprefix("eval_")
    if _NEITHER_IS_BETTER.fullmatch(name):
        raise DistillError(
            f"metric_for_best_model is {metric!r}, of which neither a greater nor a smaller value is better: use "
            "eval_kl, eval_agreement or eval_loss, or set greater_is_better."
        )
    if _SMALLER_IS_BETTER.fullmatch(name):
        return False
    return True if _GREATER_IS_BETTER.fullmatch(name) else None


def token_metrics(own: LogitPair, both: LogitPair | None) -> dict[str, Tensor]:
    """Statistics of each asked token, name -> [r], in nats or 0 and 1.

    Args:
        own: the student over all of its ids.
        both: student and teacher over the ids that both have; None: `OF_STUDENT` alone.
    """
    z, p, lse = own.p()
    label_logit, most = z.gather(1, own.labels[:, None]), own.student.amax(-1, keepdim=True)
    found = {
        "measured": torch.ones_like(lse[:, 0]),
        "student_ce": (lse - label_logit)[:, 0],
        "student_entropy": lse[:, 0] - own.mean(p, z),
        "accuracy": (own.student.gather(1, own.labels[:, None]) >= most)[:, 0].to(z.dtype),
    }
    if both is None:
        return found
    told = both.whole
    y, q, lse_t = both.q()
    z, _, lse = both.p()
    found["kl"] = both.mean(q, torch.sub(y, z, out=both.take())) + (lse - lse_t)[:, 0]
    known = own.labels < told.shape[1]
    label_logit = told.gather(1, (own.labels * known)[:, None])
    whole = lse_t if told.shape == both.q().logits.shape else torch.logsumexp(told, 1, keepdim=True)
    found["teacher_ce"] = torch.where(known, (whole - label_logit)[:, 0], torch.inf)
    found["teacher_entropy"] = lse_t[:, 0] - both.mean(q, y)
    best = told.argmax(-1, keepdim=True)
    inside = best < own.student.shape[1]
    hit = own.student.gather(1, best * inside) >= most
    found["agreement"] = (hit & inside)[:, 0].to(z.dtype)
    return found
