"""Whether a training's loss still fell when it ended, and whether the KL to the teacher rose while it lasted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import linear_regression, variance
from typing import Any

LINES = 8  # fewer say nothing of a trend
FALLS, FELL = 0.03, 0.05  # a fall: of the loss, and nats/token at least, for a soft loss near 0 halves all the time
SURE = 2.5  # standard errors
LEVEL = 0.06  # of the loss, or FELL: what has surely fallen less is flat
ROSE = 0.1  # of the KL to the teacher, by which it has risen
HIGH = 0.5  # of the highest learning rate: below, a flat loss may only say that the rate is low


@dataclass(frozen=True)
class LinearTrend:
    """How much a loss fell from the first to the second half of a stretch of steps, by a straight line through it.

    nats:   how much, in the loss's own unit
    error:  standard error of it; the line's, for means of both halves would count the fall itself as noise
    before: the line in the middle of the first half
    """

    nats: float
    error: float
    before: float

    @property
    def share(self) -> float:
        """Of the loss before."""
        return self.nats / max(self.before, 1e-12)

    @property
    def falls(self) -> bool:
        """Beyond what noise explains."""
        return self.nats >= max(SURE * self.error, FALLS * self.before, FELL)

    @property
    def flat(self) -> bool:
        """Surely not much; which is more than not to fall for sure."""
        return not self.falls and self.nats + 2 * self.error < max(LEVEL * self.before, FELL)


@dataclass(frozen=True)
class Trend:
    """The course of a training's loss.

    at_end:     of the second half of all steps: from the third quarter to the last
    while_high: of the last two thirds of the steps at a high learning rate
    """

    at_end: LinearTrend
    while_high: LinearTrend


def trend_of(logs: Sequence[Mapping[str, Any]]) -> Trend | None:
    """The trend of lines with `loss`, and `learning_rate` where there is one; None: they are too few."""
    lines = [log for log in logs if "loss" in log]
    highest = max((log.get("learning_rate", 0.0) for log in lines), default=0.0)
    high = [log for log in lines if log.get("learning_rate", highest) >= HIGH * highest]
    if len(lines) < LINES or len(high) < 6:
        return None
    return Trend(_fall(lines[len(lines) // 2 :]), _fall(high[len(high) // 3 :]))


@dataclass(frozen=True)
class KlTrend:
    """The KL to the teacher of a training's first evaluations, or steps, and of its last ones, in nats/token.

    lowest: the least before the last
    step:   of `lowest`
    last:   at the end
    rises:  whether `last` is above `lowest` by more than noise explains
    """

    lowest: float
    step: int
    last: float
    rises: bool


def kl_trend_of(logs: Sequence[Mapping[str, Any]]) -> KlTrend | None:
    """The course of the KL over evaluations (`eval_kl`), or over steps (`kl`) where fewer than two were evaluated.

    An evaluation is always of the same rows, so that a rise by ROSE of it, and FELL, is no noise. None: the log has
    too few lines.
    """
    evaluated = [log for log in logs if isfinite(log.get("eval_kl", inf))]
    if len(evaluated) >= 2:
        *before, last = evaluated
        lowest = min(before, key=lambda log: log["eval_kl"])
        rise = last["eval_kl"] - lowest["eval_kl"]
        rises = rise >= max(ROSE * lowest["eval_kl"], FELL)
        return KlTrend(lowest["eval_kl"], int(lowest.get("step", 0)), last["eval_kl"], rises)
    lines = [log for log in logs if isfinite(log.get("kl", inf))]
    if len(lines) < LINES:
        return None
    half = lines[len(lines) // 2 :]
    fall = _fall(half, "kl")
    rises = -fall.nats >= max(SURE * fall.error, ROSE * fall.before, FELL)
    return KlTrend(fall.before, int(half[len(half) // 4].get("step", 0)), fall.before - fall.nats, rises)


def _fall(lines: Sequence[Mapping[str, Any]], name: str = "loss") -> LinearTrend:
    steps, losses = range(len(lines)), [log[name] for log in lines]
    slope, start = linear_regression(steps, losses)
    half, spread = len(lines) / 2, variance(steps) * (len(lines) - 1)
    left = sum((loss - start - slope * step) ** 2 for step, loss in zip(steps, losses, strict=True))
    error = (left / (len(lines) - 2) / spread) ** 0.5
    return LinearTrend(-slope * half, error * half, start + slope * (half - 1) / 2)
