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
    hub_name: id of the metric on the Hub, for the metadata of cards; None for one that is not there
    """

    key: str
    title: str
    digits: int
    is_share: bool = False
    hub_name: str | None = None


CONTROL_TITLES = {  # value of `control` in a recipe -> what the control is
    "sft": "control (hard labels only)",
    "sft_on_data": "control (hard labels of the data's completions)",
    "direct": "control (distilled directly)",
    "full_precision": "same student in full precision",
}
DEFAULT_TARGET = "token"  # noun for a target of language models
HELD_OUT_METRICS = (
    HeldOutMetric("perplexity", "perplexity", 2, hub_name="perplexity"),
    HeldOutMetric("accuracy", "accuracy", 3, is_share=True, hub_name="accuracy"),
    HeldOutMetric("f1", "F1", 3, hub_name="f1"),
    HeldOutMetric("mean_iou", "mean IoU", 3, is_share=True, hub_name="mean_iou"),
    HeldOutMetric("exact_match", "exact match", 3, is_share=True, hub_name="exact_match"),
    HeldOutMetric("pearson", "Pearson correlation", 3, hub_name="pearsonr"),
    HeldOutMetric("spearman", "Spearman correlation", 3, hub_name="spearmanr"),
    HeldOutMetric("teacher_mse", "squared error to the teacher", 4),
    HeldOutMetric("embedding_cosine", "cosine similarity of embeddings", 3),
    HeldOutMetric("kl", "KL to the teacher, nats/{target}", 4),
    HeldOutMetric("agreement", "top-1 agreement", 3, is_share=True),
    HeldOutMetric("bits_per_byte", "bits per byte", 4),
    HeldOutMetric("chunk_kl", "KL to the teacher, nats/chunk", 4),
    HeldOutMetric("chunk_agreement", "top-1 agreement of chunks", 3, is_share=True),
)
VOCABULARY = "vocabulary"  # number of a student's vocabulary, in the metrics of a chain whose students have several
_OF_TEACHER = {
    "teacher_mse": 0.0,
    "embedding_cosine": 1.0,
    "kl": 0.0,
    "agreement": 1.0,
    "chunk_kl": 0.0,
    "chunk_agreement": 1.0,
}


def shown_metrics(models: Iterable[Metrics], target: str = DEFAULT_TARGET) -> list[HeldOutMetric]:
    """Return the metrics that at least one of several models has.

    Args:
        models: the metrics of each model.
        target: noun for a target of the models, see `OutputType.target`.
    """
    models = list(models)
    shown = [metric for metric in HELD_OUT_METRICS if any(metric.key in each for each in models)]
    return [metric._replace(title=metric.title.format(target=target)) for metric in shown]


def target_words(target: str) -> str:
    """Return the plural of the noun for a target, with "target" before tokens."""
    return "target tokens" if target == DEFAULT_TARGET else f"{target}s"


def has_any(metrics: Mapping[str, float], shown: Iterable[HeldOutMetric]) -> bool:
    """Whether a model has one of the metrics."""
    return any(metric.key in metrics for metric in shown)


def metrics_of_teacher(student: Mapping[str, float]) -> Metrics:
    """Return the teacher's metrics, as far as the evaluation of a student measured them; empty if it did not."""
    measured = {
        metric.key: student[name] for metric in HELD_OUT_METRICS if (name := f"teacher_{metric.key}") in student
    }
    return {**measured, **{key: value for key, value in _OF_TEACHER.items() if key in student}} if measured else {}


def rows_with_teacher(
    models: Mapping[str, Metrics], titles: Mapping[str, str], shown: Iterable[HeldOutMetric]
) -> list[tuple[str, Metrics]]:
    """Return the rows of a table, each with its title: the teacher's, then those of the models that were evaluated.

    The students of a chain may have different tokens, over which perplexities are not comparable. Then the teacher has
    a row for each vocabulary, before the first of its students.

    Args:
        models: name -> metrics; the last student is called "student".
        titles: name -> title, in the order of the rows.
        shown: the metrics of the table.
    """
    shown = list(shown)
    evaluated = [(title, models[name]) for name, title in titles.items() if has_any(models.get(name, {}), shown)]
    vocabularies = [metrics.get(VOCABULARY) for _, metrics in evaluated]
    if len({*vocabularies}) < 2:
        teacher = metrics_of_teacher(models.get("student", {}))
        return [("teacher", teacher), *evaluated] if teacher else evaluated
    rows = list[tuple[str, Metrics]]()
    for i, row in enumerate(evaluated):
        if i == 0 or vocabularies[i - 1] != vocabularies[i]:
            rows.append(("teacher, over the tokens of the rows below", metrics_of_teacher(row[1])))
        rows.append(row)
    return rows


_LARGE = 1e7  # from which a value does not fit its column


def formatted(metrics: Mapping[str, float], shown: Iterable[HeldOutMetric], percent: bool = False) -> list[str]:
    """Return the values of metrics as text; "-" for those that a model does not have. Large ones have an exponent.

    Args:
        metrics: of a model.
        shown: which ones.
        percent: whether shares are written in percent.
    """
    cells = []
    for metric in shown:
        value = metrics.get(metric.key)
        spec = ".1%" if percent and metric.is_share else f".{metric.digits}f"
        if value is not None and abs(value) >= _LARGE:
            spec = ".2e"
        cells.append("-" if value is None else format(value, spec))
    return cells
