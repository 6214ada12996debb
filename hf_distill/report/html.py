"""One page that shows what a run did: no file beside it, no network, light or dark, on screen or paper."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..errors import require_package
from ..runner.run_results import Run
from .analysis_sections import curve, diagnosis, inspection, retention, samples, temperature
from .figures import png
from .run_sections import provenance, results, training


@dataclass(frozen=True)
class Report:
    """A report that was written.

    path:    of the page
    figures: name -> PNG of each of its plots
    missing: what it has not -> the command that adds it
    """

    path: Path
    figures: dict[str, Path]
    missing: dict[str, str]


def report(run: Run, on_stage: Callable[[str], None] = lambda text: None) -> Report:
    """Write RUN/report.html, and its plots as RUN/figures/NAME.png, of what stands in the run's folder.

    Nothing is computed anew: `hf-distill inspect`, `diagnose`, `retention` and `curve` leave in the folder what their
    sections show, and the page says which are missing.

    Args:
        run: see `open_run`.
        on_stage: told in a few words what begins.

    Raises:
        DistillError: matplotlib is not installed, or the folder lacks what a run writes.
    """
    require_package("matplotlib", "report", "A report")
    from jinja2 import Environment

    for name in ("results.json", "metrics.jsonl"):
        run.path(name)
    on_stage("Drawing")
    makers = (results, diagnosis, training, inspection, temperature, curve, retention, samples, provenance)
    sections = [make(run) for make in makers]
    shown = [section for section in sections if not section.missing]
    missing = {what: command for section in sections for what, command in section.missing.items()}
    (run.folder / "figures").mkdir(exist_ok=True)
    drawn = [figure for section in shown for figure in section.figures]
    figures = {figure.name: png(figure.drawn, run.folder / "figures" / f"{figure.name}.png") for figure in drawn}
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("report.html").read_text()
    )
    page = template.render(title=_title(run), subtitle=_subtitle(run), sections=shown, missing=missing)
    half = run.folder / "report.html.half"
    half.write_text(page)
    half.replace(run.folder / "report.html")
    return Report(run.folder / "report.html", figures, missing)


def _title(run: Run) -> str:
    return f"{run.folder.resolve().name}: a student of {run.recipe.tokenizer_model.rpartition('/')[2]}"


def _subtitle(run: Run) -> str:
    evidence = run.results
    sizes = [
        f"{role.capitalize()} of {size['parameters'] / 1e6:,.1f}M parameters in {size['blocks']} blocks"
        for role in ("teacher", "student")
        if (size := evidence.get(role, {})).get("parameters")
    ]
    made = evidence.get("environment", {})
    where = ", ".join(
        f"{name} {made[name]}" for name in ("hf_distill", "torch", "transformers", "device") if name in made
    )
    return ". ".join([*sizes, f"Made with {where}."])
