"""The tables of a card, as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..core.escape import markdown
from ..core.held_out_metrics import (
    CONTROL_TITLES,
    formatted,
    rows_with_teacher,
    shown_metrics,
    target_words,
)
from ..core.quantized_titles import with_quantization
from ..core.results import Metrics
from .data import ScoreFacts, TaskFacts

MODEL_TITLES = {
    "before": "student before training",
    "student": "student",
    "control": CONTROL_TITLES["sft"],
    "peer": "peer",
    "ema": "EMA teacher",
}


@dataclass(frozen=True)
class Table:
    """A Markdown table with a sentence that describes it; both are empty if there is nothing to show."""

    text: str = ""
    table: str = ""


def held_out_table(models: Mapping[str, Metrics], target: str, quantized: bool = False, control: str = "sft") -> Table:
    """Return the metrics of models on the held-out rows, the teacher first; only losses if there are no others.

    Args:
        models: name -> metrics.
        target: noun for a target.
        quantized: whether the student is quantized.
        control: value of `control` in the recipe.
    """
    titles = with_quantization(MODEL_TITLES | {"control": CONTROL_TITLES[control]}, quantized)
    shown = shown_metrics(models.values(), target)
    if not shown:
        losses = {name: m["loss"] for name, m in models.items() if "loss" in m}
        rows = [[titles.get(name, name), f"{loss:.4f}"] for name, loss in losses.items()]
        if not losses:
            return Table()
        return Table("Loss on the held-out rows.", _markdown(["", "loss"], rows))
    ordered = {name: name.replace("-", " ") for name in models if name not in titles} | titles
    rows = [
        [title, *formatted(metrics, shown, percent=True)]
        for title, metrics in rows_with_teacher(models, ordered, shown)
    ]
    targets = f"{target_words(target)} of the held-out rows" if target != "row" else "held-out rows"
    text = f"Metrics over the {targets}, at temperature 1."
    return Table(text, _markdown(["", *(metric.title for metric in shown)], rows))


def retention_table(tasks: Sequence[TaskFacts]) -> Table:
    """Return the scores on evaluation tasks, with the student's percent of the teacher's score."""
    if not tasks:
        return Table()
    models = [m for m in ("teacher", "before", "student", "control") if any(m in t["scores"] for t in tasks)]
    rows = []
    for task in tasks:
        cells = [_score(task["scores"].get(model)) for model in models]
        relative = (task["relative_scores"] or {}).get("student")
        percent = f"{relative['percent']:.0f} % [{relative['low']:.0f}, {relative['high']:.0f}]" if relative else "-"
        rows.append([task["task"], task["metric"], f"{task['examples']}", *cells, percent])
    text = (
        "Scores on tasks of the lm-evaluation-harness, with standard errors. The column retention is the student's "
        "percent of the teacher's score, with a 95 % interval from a bootstrap over examples."
    )
    return Table(text, _markdown(["task", "metric", "examples", *models, "retention"], rows))


def _score(score: ScoreFacts | None) -> str:
    return f"{score['value']:.3f} ± {score['stderr']:.3f}" if score else "-"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[markdown(cell) for cell in line] for line in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
