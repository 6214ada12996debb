"""The metrics of held-out rows that tables show: which ones, under which titles, and their values for the teacher."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .results import Metrics


class HeldOutMetric(NamedTuple):
    """A metric in tables.

    key:      its name in the metrics
    title:    heading of its column
    digits:   digits after the decimal point
    is_share: whether it is a share between 0 and 1
    """

    key: str
    title: str
    digits: int
    is_share: bool = False


HELD_OUT_METRICS = (
    HeldOutMetric("perplexity", "perplexity", 2),
    HeldOutMetric("kl", "KL to the teacher, nats/token", 4),
    HeldOutMetric("agreement", "top-1 agreement", 3, is_share=True),
    HeldOutMetric("bits_per_byte", "bits per byte", 4),
    HeldOutMetric("chunk_kl", "KL to the teacher, nats/chunk", 4),
    HeldOutMetric("chunk_agreement", "top-1 agreement of chunks", 3, is_share=True),
)
_OF_TEACHER = {"kl": 0.0, "agreement": 1.0, "chunk_kl": 0.0, "chunk_agreement": 1.0}


def shown_metrics(models: Iterable[Metrics]) -> list[HeldOutMetric]:
    """Return the metrics that at least one of several models has."""
    models = list(models)
    return [metric for metric in HELD_OUT_METRICS if any(metric.key in each for each in models)]


def metrics_of_teacher(student: Mapping[str, float]) -> Metrics:
    """Return the teacher's metrics, as far as the evaluation of a student measured them; empty if it did not."""
    measured = {
        metric.key: student[name] for metric in HELD_OUT_METRICS if (name := f"teacher_{metric.key}") in student
    }
    return {**measured, **{key: value for key, value in _OF_TEACHER.items() if key in student}} if measured else {}


def formatted(metrics: Mapping[str, float], shown: Iterable[HeldOutMetric], percent: bool = False) -> list[str]:
    """Return the values of metrics as text; "-" for those that a model does not have.

    Args:
        metrics: of a model.
        shown: which ones.
        percent: whether shares are written in percent.
    """
    cells = []
    for metric in shown:
        spec = ".1%" if percent and metric.is_share else f".{metric.digits}f"
        cells.append(format(metrics[metric.key], spec) if metric.key in metrics else "-")
    return cells
