"""Trends in a training log: whether the loss was still falling at the end, and whether the KL to the teacher rose."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import linear_regression, variance

MIN_LOG_LINES = 8  # fewer lines give no trend
# A fall is at least this share of the loss, and at least this many nats/token, because a soft loss near 0 halves often.
MIN_FALL_SHARE, MIN_FALL_NATS = 0.03, 0.05
MIN_STANDARD_ERRORS = 2.5  # by which a change must exceed noise
MAX_FLAT_FALL_SHARE = 0.06  # of the loss, or MIN_FALL_NATS; a smaller fall counts as flat
MIN_RISE_SHARE = 0.1  # of the KL to the teacher
HIGH_RATE_SHARE = 0.5  # of the highest learning rate; below, the loss may be flat because the rate is low


@dataclass(frozen=True)
class LinearTrend:
    """Fall of a loss from the first to the second half of a range of steps, by linear regression.

    nats:   the fall, in the unit of the loss
    error:  its standard error from the regression; the difference of the halves' means would count the fall as noise
    before: value of the regression line in the middle of the first half
    """

    nats: float
    error: float
    before: float

    @property
    def share(self) -> float:
        """Fall as a share of `before`."""
        return self.nats / max(self.before, 1e-12)

    @property
    def falls(self) -> bool:
        """Whether the fall exceeds noise and the thresholds."""
        return self.nats >= max(MIN_STANDARD_ERRORS * self.error, MIN_FALL_SHARE * self.before, MIN_FALL_NATS)

    @property
    def flat(self) -> bool:
        """Whether the fall is small with certainty; this is stricter than `not falls`."""
        limit = max(MAX_FLAT_FALL_SHARE * self.before, MIN_FALL_NATS)
        return not self.falls and self.nats + 2 * self.error < limit


@dataclass(frozen=True)
class Trend:
    """Trends of a training loss.

    at_end:     over the second half of all steps: from the third quarter to the last
    while_high: over the last two thirds of the steps at a high learning rate
    """

    at_end: LinearTrend
    while_high: LinearTrend


def trend_of(logs: Sequence[Mapping[str, float]]) -> Trend | None:
    """Return the trend of log lines with `loss` and, optionally, `learning_rate`; None if there are too few lines."""
    lines = [log for log in logs if "loss" in log]
    highest = max((log.get("learning_rate", 0.0) for log in lines), default=0.0)
    high = [log for log in lines if log.get("learning_rate", highest) >= HIGH_RATE_SHARE * highest]
    if len(lines) < MIN_LOG_LINES or len(high) < 6:
        return None
    return Trend(_linear_trend(lines[len(lines) // 2 :]), _linear_trend(high[len(high) // 3 :]))


@dataclass(frozen=True)
class KlTrend:
    """Course of the KL to the teacher over evaluations or steps of a training, in nats/token.

    lowest: the lowest value before the last one
    step:   step of `lowest`
    last:   value at the end
    rises:  whether `last` exceeds `lowest` by more than noise
    """

    lowest: float
    step: int
    last: float
    rises: bool


def kl_trend_of(logs: Sequence[Mapping[str, float]]) -> KlTrend | None:
    """Return the course of the KL over evaluations (`eval_kl`), or over steps (`kl`) if fewer than two were evaluated.

    All evaluations use the same rows, so a rise by MIN_RISE_SHARE and MIN_FALL_NATS is not noise. None: the log has too
    few lines.
    """
    evaluations = [log for log in logs if isfinite(log.get("eval_kl", inf))]
    if len(evaluations) >= 2:
        *before, last = evaluations
        lowest = min(before, key=lambda log: log["eval_kl"])
        rise = last["eval_kl"] - lowest["eval_kl"]
        rises = rise >= max(MIN_RISE_SHARE * lowest["eval_kl"], MIN_FALL_NATS)
        return KlTrend(lowest["eval_kl"], int(lowest.get("step", 0)), last["eval_kl"], rises)
    lines = [log for log in logs if isfinite(log.get("kl", inf))]
    if len(lines) < MIN_LOG_LINES:
        return None
    half = lines[len(lines) // 2 :]
    trend = _linear_trend(half, "kl")
    rises = -trend.nats >= max(MIN_STANDARD_ERRORS * trend.error, MIN_RISE_SHARE * trend.before, MIN_FALL_NATS)
    return KlTrend(trend.before, int(half[len(half) // 4].get("step", 0)), trend.before - trend.nats, rises)


def _linear_trend(lines: Sequence[Mapping[str, float]], name: str = "loss") -> LinearTrend:
    steps, losses = range(len(lines)), [log[name] for log in lines]
    slope, start = linear_regression(steps, losses)
    half, spread = len(lines) / 2, variance(steps) * (len(lines) - 1)
    squared_residuals = sum((loss - start - slope * step) ** 2 for step, loss in zip(steps, losses, strict=True))
    error = (squared_residuals / (len(lines) - 2) / spread) ** 0.5
    return LinearTrend(-slope * half, error * half, start + slope * (half - 1) / 2)
