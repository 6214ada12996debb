"""The command prune: writes the pruned student of a recipe, and searches its shape."""

import json
import shlex
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ...core.defaults import SEARCH_CRITERION, SEARCH_ETA, SHAPE_SEARCH_STEPS
from ...core.held_out_metrics import formatted, metrics_of_teacher, shown_metrics
from ...core.pruned_sizes import millions, shape_text
from ...errors import DistillError
from ..app import (
    AllowPickles,
    AsJson,
    Overrides,
    Recipe,
    Smoke,
    TrustRemoteCode,
    Yes,
    app,
    disable_library_progress_bars,
    out,
)
from ..confirm import confirm_downloads

if TYPE_CHECKING:
    from ...analysis.shape_search import ShapeSearchResult
    from ...recipe.schema import Recipe as LoadedRecipe
    from ...runner.prune import PrunedModel

_FROM_TEACHER = "student.from_teacher"


@app.command()
def prune(
    recipe: Recipe,
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the student; it must not exist.")],
    overrides: Overrides = None,
    by: Annotated[
        str | None,
        typer.Option(
            help="Criterion of the search for target_parameters: nll of the labels, or kl to the teacher.",
            show_default=SEARCH_CRITERION,
        ),
    ] = None,
    eta: Annotated[
        int | None,
        typer.Option(help="After each rung of the search, one of ETA shapes continues.", show_default=str(SEARCH_ETA)),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            help="Length of the search: the last ETA shapes are trained for STEPS / ETA steps.",
            show_default=str(SHAPE_SEARCH_STEPS),
        ),
    ] = None,
    smoke: Smoke = False,
    yes: Yes = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Prune a student from its teacher, and write it with its evaluation before training.

    With student.from_teacher.target_parameters, shapes of this size are compared in short runs first, in OUTPUT-search;
    an interrupted search continues when the command is repeated.
    """
    from ...recipe.load import load_recipe

    requested = overrides or []
    search_options: dict[str, Any] = {"by": by, "eta": eta, "steps": steps}
    search_options = {name: value for name, value in search_options.items() if value is not None}
    # The 4 steps of a smoke run are too few for the rungs.
    smoke_steps = [f"train.max_steps={SHAPE_SEARCH_STEPS if steps is None else steps}"] if smoke else []
    loaded = load_recipe(recipe, [*smoke_steps, *requested], smoke=smoke)
    out.quiet |= as_json
    confirm_downloads(recipe, loaded, yes)
    disable_library_progress_bars()
    from ...analysis.shape_search import as_json as search_values
    from ...analysis.shape_search import find_shape
    from ...runner.model_loading import LoadPolicy, load_policy
    from ...runner.prune import check_prunable_recipe, prune_recipe
    from ..progress import RichProgress

    search = None
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        check_prunable_recipe(loaded, output)
        if _needs_search(loaded, search_options):
            search = find_shape(loaded, f"{output}-search", on_stage=progress.log_stage, **search_options)
            loaded = loaded.model_copy(deep=True)
            loaded.student.from_teacher = search.from_teacher
        model = prune_recipe(loaded, output, progress.log_stage, None if search is None else search_values(search))
    if as_json:
        values = {"folder": str(model.folder), "metrics": model.metrics, "student": model.student}
        search_results = {} if search is None else {"search": search_values(search)}
        sys.stdout.write(json.dumps({**values, "teacher": model.teacher, **search_results}, indent=2) + "\n")
        return
    if search is not None:
        out.print(_search_table(search))
    out.print(_table(model, quantized=loaded.student.quantize is not None))
    out.print(f"Student: {model.folder}", soft_wrap=True, highlight=False)
    command = _training_command(recipe, requested, search, smoke)
    out.print(f"Train it: {command}", soft_wrap=True, highlight=False, markup=False)


def _needs_search(recipe: "LoadedRecipe", search_options: Mapping[str, Any]) -> bool:
    """Whether the shape of the student is searched.

    Raises:
        DistillError: it is not, and options of the search are given.
    """
    cut = recipe.student.from_teacher
    if cut is not None and cut.target_parameters is not None:
        return True
    if search_options:
        raise DistillError(
            f"{', '.join(f'--{name}' for name in search_options)} would have no effect: the sizes of the student are "
            "given, so no shapes are compared. Set student.from_teacher.target_parameters for a search, or leave the "
            "options out."
        )
    return False


def _training_command(recipe: str, overrides: list[str], search: "ShapeSearchResult | None", smoke: bool) -> str:
    """Return the command that trains the student; a search has replaced the number of parameters by sizes."""
    command = ["hf-distill", "run", recipe]
    command += [override for override in overrides if search is None or not override.startswith(_FROM_TEACHER)]
    if search is not None:
        sizes = search.from_teacher.model_dump(exclude_unset=True, exclude_defaults=True)
        command.append(f"{_FROM_TEACHER}={{{', '.join(f'{name}: {value}' for name, value in sizes.items())}}}")
    return shlex.join([*command, *(["--smoke"] if smoke else [])])


def _table(model: "PrunedModel", quantized: bool) -> Table:
    """Return a table of teacher and student before training; a quantized student is evaluated with rounded weights."""
    shown = shown_metrics([model.metrics])
    table = Table(title="Metrics on held-out rows, before training", box=None, pad_edge=False)
    for heading in ("", "parameters", *(metric.title for metric in shown)):
        table.add_column(heading, justify="right" if heading else "left")
    teacher = metrics_of_teacher(model.metrics)
    if teacher:
        table.add_row("teacher", millions(model.teacher.get("parameters")), *formatted(teacher, shown))
    table.add_row(
        "student, quantized" if quantized else "student",
        millions(model.student.get("parameters")),
        *formatted(model.metrics, shown),
    )
    return table


def _search_table(result: "ShapeSearchResult") -> Table:
    """Return a table of all shapes, with the winner in bold."""
    title = f"Shapes on held-out rows, the best by {result.by} first ({result.steps} steps in all)"
    table = Table(title=title, box=None, pad_edge=False)
    for heading in ("shape", "parameters", "NLL before", "steps", "NLL", "KL to teacher"):
        table.add_column(heading, justify="left" if heading == "shape" else "right")
    for number, candidate in enumerate(result.candidates):
        first, last = candidate.rungs[0], candidate.rungs[-1]
        sizes = {"layers" if name == "keep_layers" else name: size for name, size in candidate.sizes.items()}
        values = [millions(candidate.parameters), f"{first.nll:.3f}", f"{last.step}", f"{last.nll:.3f}"]
        values.append("-" if last.kl is None else f"{last.kl:.3f}")
        table.add_row(f"{candidate.name}: {shape_text(sizes)}", *values, style="" if number else "bold")
    return table
