"""The tables of a card, as Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..core.escape import markdown

MODELS = {
    "before": "student before",
    "student": "student",
    "control": "control: hard labels alone",
    "peer": "peer",
    "ema": "average",
}
SHOWN = (
    ("perplexity", "perplexity", ".2f"),
    ("kl", "KL to the teacher, nats/token", ".4f"),
    ("agreement", "same first choice", ".1%"),
)


@dataclass(frozen=True)
class Table:
    """A table as Markdown, and what it is of; empty where there is nothing to show."""

    text: str = ""
    table: str = ""


def held_out_table(models: Mapping[str, Mapping[str, float]]) -> Table:
    """Models over the held-out rows, the teacher first; their objective where nothing else is known."""
    shown = [item for item in SHOWN if any(item[0] in m for m in models.values())]
    if not shown:
        losses = {name: m["loss"] for name, m in models.items() if "loss" in m}
        rows = [[MODELS.get(name, name), f"{loss:.4f}"] for name, loss in losses.items()]
        if not losses:
            return Table()
        return Table("The objective over held-out rows.", _markdown(["", "loss"], rows))
    rows, after = [], models.get("student", {})
    if "teacher_perplexity" in after:
        known = {"perplexity": after["teacher_perplexity"], "kl": 0.0, "agreement": 1.0}
        rows.append(["teacher", *(format(known[key], form) for key, _, form in shown)])
    order = [name for name in models if name not in MODELS] + [name for name in MODELS if name in models]
    for name in order:
        cells = [format(models[name][key], form) if key in models[name] else "-" for key, _, form in shown]
        if set(cells) != {"-"}:
            rows.append([MODELS.get(name, name.replace("-", " ")), *cells])
    text = "Over the asked tokens of the held-out rows, at temperature 1."
    return Table(text, _markdown(["", *(heading for _, heading, _ in shown)], rows))


def retention_table(tasks: Sequence[Mapping[str, Any]]) -> Table:
    """What the student kept on tasks."""
    if not tasks:
        return Table()
    models = [m for m in ("teacher", "before", "student", "control") if any(m in t["scores"] for t in tasks)]
    rows = []
    for task in tasks:
        cells = [_scored(task["scores"].get(model)) for model in models]
        kept = (task["kept"] or {}).get("student")
        share = f"{kept['percent']:.0f} % [{kept['low']:.0f}, {kept['high']:.0f}]" if kept else "-"
        rows.append([task["task"], task["metric"], f"{task['examples']}", *cells, share])
    text = (
        "Tasks of the lm-evaluation-harness: scores with standard errors; kept is the student's share of the teacher's "
        "score, with a 95 % interval over examples."
    )
    return Table(text, _markdown(["task", "metric", "examples", *models, "kept"], rows))


def _scored(score: Mapping[str, float] | None) -> str:
    return f"{score['value']:.3f} ± {score['stderr']:.3f}" if score else "-"


def _markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [[markdown(cell) for cell in line] for line in (headings, *rows)]
    lines.insert(1, ["---"] * len(headings))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
