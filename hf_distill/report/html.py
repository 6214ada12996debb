"""Writes a run as one HTML page without external files: readable offline, in light and dark mode, and in print."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from ..core import run_files
from ..core.files import write_atomic
from ..core.pruned_sizes import millions
from ..errors import require_package
from ..runner.run_results import Run
from .analysis_sections import curve, diagnosis, draft, inspection, retention, samples, temperature
from .figures import png
from .generated_data import generated_data
from .run_sections import provenance, results, training


@dataclass(frozen=True)
class Report:
    """A report that was written.

    path:    of the page
    figures: name -> PNG of each plot
    missing: content that the run does not have -> command that adds it
    """

    path: Path
    figures: dict[str, Path]
    missing: dict[str, str]


def report(run: Run, on_stage: Callable[[str], None] = lambda text: None) -> Report:
    """Write RUN/report.html and its plots as RUN/figures/NAME.png, from the files in the run's folder.

    Nothing is computed again: `hf-distill inspect`, `diagnose`, `retention`, `draft` and `curve` write the results that
    their sections show, and the page lists the sections that are missing.

    Args:
        run: see `open_run`.
        on_stage: called with a short description of each stage as it begins.

    Returns:
        the path of the page, and the sections that are missing.

    Raises:
        DistillError: matplotlib is not installed, or the folder lacks a file that every run writes.
    """
    require_package("matplotlib", "report", "A report")
    from jinja2 import Environment

    for name in (run_files.RESULTS, run_files.METRICS):
        run.path(name)
    on_stage("Drawing the plots")
    builders = (
        results,
        diagnosis,
        training,
        generated_data,
        inspection,
        temperature,
        curve,
        retention,
        draft,
        samples,
        provenance,
    )
    sections = [build(run) for build in builders]
    shown = [section for section in sections if not section.missing and not section.is_empty]
    missing = {content: command for section in sections for content, command in section.missing.items()}
    (run.folder / "figures").mkdir(exist_ok=True)
    figures = {
        figure.name: png(figure.figure, run.folder / "figures" / f"{figure.name}.png")
        for section in shown
        for figure in section.figures
    }
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        files(__package__).joinpath("report.html").read_text()
    )
    page = template.render(title=_title(run), subtitle=_subtitle(run), sections=shown, missing=missing)
    write_atomic(run.folder / run_files.REPORT, page)
    return Report(run.folder / run_files.REPORT, figures, missing)


def _title(run: Run) -> str:
    teacher = str(run.recipe.primary_teacher.loaded_model or run.recipe.tokenizer_model)
    return f"{run.folder.resolve().name}: a student of {teacher.rpartition('/')[2]}"


def _subtitle(run: Run) -> str:
    evidence = run.results
    models = {"Teacher": evidence.get("teacher", {}), "Student": evidence.get("student", {})}
    sizes = [
        f"{role}: {millions(size['parameters'])} parameters, {size['layers']} layers"
        for role, size in models.items()
        if size.get("parameters")
    ]
    environment = evidence.get("environment", {})
    names = ("hf_distill", "torch", "transformers", "device")
    versions = ", ".join(f"{name} {environment[name]}" for name in names if name in environment)
    return ". ".join([*sizes, f"Environment: {versions}."])
