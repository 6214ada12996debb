"""The sections of a report: what stands in a run's folder, as words, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..cache.files import file_entry
from ..runner.run_results import Run
from . import plots
from .figures import svg

MODELS = {
    "before": "student before",
    "student": "student after",
    "control": "control",
    "peer": "peer",
    "ema": "average",
}


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure, with what to see in it."""

    name: str
    drawn: Any
    caption: str = ""

    @property
    def svg(self) -> str:
        """For a page."""
        return svg(self.drawn)


@dataclass(frozen=True)
class Section:
    """A part of the page; what it lacks is left out."""

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    verdicts: Sequence[Any] = ()
    samples: Sequence[Any] = ()
    code: Sequence[str] = ()
    missing: dict[str, str] = field(default_factory=dict)


def results(run: Run) -> Section:
    """Held-out quality of all models."""
    models = run.results["models"]
    rows, after = [], models["student"]
    if "teacher_perplexity" in after:
        rows.append(["teacher", f"{after['teacher_perplexity']:.2f}", "0", "1"])
    stages = {name: name.replace("-", " ") for name in models if name.startswith("stage-")}
    for name, title in (stages | MODELS).items():
        m = models.get(name, {})
        if "perplexity" in m:
            compared = [f"{m['kl']:.4f}", f"{m['agreement']:.3f}"] if "kl" in m else ["-", "-"]
            rows.append([title, f"{m['perplexity']:.2f}", *compared])
    table = Table(["held-out rows", "perplexity", "KL to teacher, nats/token", "top-1 agreement"], rows)
    return Section("results", "Results", [_in_words(models)], [table])


def training(run: Run) -> Section:
    """What the run logged as it went."""
    logs = {name: run.logs(name) for name in ("student", "control") if run.logs(name)}
    student = logs.get("student", [])
    drawn = [
        Figure(
            "losses", plots.losses(student), "Each term as it is logged, before its weight; T^2 is in the soft one."
        ),
        Figure("closeness", plots.closeness(logs)),
        Figure("sources", plots.sources(student)),
        Figure("entropies", plots.entropies(student), "A student far below its teacher is too sure of itself."),
    ]
    return Section("training", "Training", figures=[figure for figure in drawn if figure.drawn is not None])


def provenance(run: Run) -> Section:
    """The recipe, the models and the machine."""
    evidence = run.results
    facts = {k: v for k, v in evidence.items() if k in ("student", "teacher", "data", "caches", "environment")}
    weights = sorted((run.folder / "student").glob("*.safetensors"))
    sums = [[f"student/{entry['file']}", f"{entry['bytes']:,}", entry["sha256"]] for entry in map(file_entry, weights)]
    text = yaml.safe_dump(_rounded(facts), sort_keys=False, default_flow_style=None, width=100)
    table = [Table(["file", "bytes", "SHA-256"], sums)] if sums else []
    return Section(
        "provenance",
        "Recipe and provenance",
        ["The recipe as it ran, what the run found out, and the weights that it left."],
        table,
        code=[run.path("recipe.yaml").read_text(), text],
    )


def _in_words(models: dict[str, dict[str, float]]) -> str:
    """What the distillation brought, against the control where there is one."""
    after, control = models["student"], models.get("control", {})
    if "perplexity" not in after:
        return "The student is no language model: its losses are below."
    text = f"The student's held-out perplexity is {after['perplexity']:.2f}"
    if "perplexity" in models.get("before", {}):
        text += f", {models['before']['perplexity']:.2f} before"
    if "perplexity" in control:
        gain = 1 - after["perplexity"] / control["perplexity"]
        verdict = "better" if gain > 0 else "worse"
        text += f"; that is {abs(gain):.1%} {verdict} than the same student trained on hard labels alone"
    return text + "."


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
