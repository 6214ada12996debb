"""Sections of a report with the results and the logs of a run, as text, tables and figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import yaml

from ..analysis.verdicts import Verdict
from ..core import run_files
from ..core.files import file_entry
from ..core.held_out_metrics import CONTROL_TITLES, formatted, rows_with_teacher, shown_metrics
from ..core.pruned_sizes import millions, shape_text
from ..core.quantized_titles import with_quantization
from ..core.results import Metrics, Results
from ..recipe.tasks import target_noun
from ..runner.run_results import Run
from . import plots
from .figures import svg
from .samples import Sample

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Plot

MODEL_TITLES = {
    "before": "student before training",
    "student": "student after training",
    "control": CONTROL_TITLES["sft"],
    "peer": "peer",
    "ema": "EMA teacher",
}
# Value of `control` in a recipe -> how the control was trained.
_TRAINED = {
    "sft": "trained on hard labels only",
    "sft_on_data": "trained on the completions of the data",
    "direct": "distilled from the first teacher",
}


@dataclass(frozen=True)
class Table:
    """Headings and rows of text."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """A matplotlib figure with a caption."""

    name: str
    figure: "Plot"
    caption: str = ""

    @property
    def svg(self) -> str:
        """The figure as an SVG element for the page."""
        return svg(self.figure)


@dataclass(frozen=True)
class Section:
    """A section of the page; empty parts are left out.

    missing: content that the run does not have -> command that adds it; such a section is not shown
    """

    name: str
    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    verdicts: Sequence[Verdict] = ()
    samples: Sequence[Sample] = ()
    code: Sequence[str] = ()
    missing: dict[str, str] = field(default_factory=dict)
    is_empty: bool = False  # it does not concern the run


def results(run: Run) -> Section:
    """Held-out metrics of all models."""
    models = run.results["models"]
    shown = shown_metrics(models.values(), target_noun(run.recipe))
    stages = {name: name.replace("-", " ") for name in models if name.startswith("stage-")}
    titles = MODEL_TITLES | {"control": CONTROL_TITLES[run.recipe.control or "sft"]}
    titles = stages | with_quantization(titles, run.recipe.student.quantize is not None)
    rows = [[title, *formatted(metrics, shown)] for title, metrics in rows_with_teacher(models, titles, shown)]
    table = Table(["held-out rows", *(metric.title for metric in shown)], rows)
    return Section("results", "Results", [_summary(models, run.recipe.control), *_shape(run.results)], [table])


def training(run: Run) -> Section:
    """Plots of the logged metrics."""
    logs = {name: run.logs(name) for name in ("student", "control", "full_precision") if run.logs(name)}
    student = logs.get("student", [])
    figures = [
        (
            "losses",
            plots.losses(student),
            "Each term is shown as logged, before it is multiplied by its weight; the soft term contains T².",
        ),
        ("closeness", plots.closeness(logs), ""),
        ("sources", plots.sources(student), ""),
        (
            "entropies",
            plots.entropies(student),
            "A student whose entropy is far below the teacher's is overconfident.",
        ),
    ]
    shown = [Figure(name, figure, caption) for name, figure, caption in figures if figure is not None]
    return Section("training", "Training", figures=shown)


def provenance(run: Run) -> Section:
    """Recipe, models, machine and checksums of the weights."""
    evidence = run.results
    facts = {k: v for k, v in evidence.items() if k in ("student", "teacher", "data", "caches", "environment")}
    weights = sorted((run.folder / "student").glob("*.safetensors"))
    sums = [[f"student/{entry['file']}", f"{entry['bytes']:,}", entry["sha256"]] for entry in map(file_entry, weights)]
    text = yaml.safe_dump(_rounded(facts), sort_keys=False, default_flow_style=None, width=100)
    table = [Table(["file", "bytes", "SHA-256"], sums)] if sums else []
    return Section(
        "provenance",
        "Recipe and provenance",
        ["The resolved recipe, the models, data and machine of the run, and the checksums of the student's weights."],
        table,
        code=[run.path(run_files.RECIPE).read_text(), text],
    )


def _shape(results: Results) -> list[str]:
    """Return a sentence on what the student was pruned to; nothing if it was not pruned."""
    student, teacher = results.get("student", {}), results.get("teacher", {})
    layers = student.get("layers_kept")
    shape = shape_text({"layers": len(layers) if layers else None, **student.get("widths", {})})
    if not shape:
        return []
    sizes = [model["parameters"] for model in (student, teacher) if "parameters" in model]
    text = " of ".join(map(millions, sizes))
    return [f"The student was pruned to {shape}{f': {text} parameters' if len(sizes) == 2 else ''}."]


def _summary(models: dict[str, Metrics], control_kind: str | None) -> str:
    """Return one sentence on the student's perplexity, compared with the control if there is one."""
    after, control = models["student"], models.get("control", {})
    if "perplexity" not in after:
        return "The student is not a language model: see its losses below."
    text = f"The student's held-out perplexity is {after['perplexity']:.2f}"
    if "perplexity" in models.get("before", {}):
        text += f" ({models['before']['perplexity']:.2f} before training)"
    if "perplexity" in control:
        gain = 1 - after["perplexity"] / control["perplexity"]
        comparison = "better" if gain > 0 else "worse"
        trained = _TRAINED[control_kind or "sft"]
        text += f", which is {abs(gain):.1%} {comparison} than that of the same student {trained}"
    if "full_precision" in models:
        full, after_training = models["full_precision"]["perplexity"], models["quantized_after"]["perplexity"]
        text += (
            f". That of the same student in full precision is {full:.2f}: quantization while distilling changes it by "
            f"{after['perplexity'] / full - 1:+.1%}, quantization after training by {after_training / full - 1:+.1%}"
        )
    return text + "."


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
