"""The `temperature` command: searches temperature and alpha in short runs."""

import json
import shlex
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...core.defaults import SEARCH_CRITERION, SEARCH_ETA
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
    from ...analysis.temperature_search import SearchResult


@app.command()
def temperature(
    recipe: Recipe,
    overrides: Overrides = None,
    at: Annotated[
        list[float] | None, typer.Option("-t", "--temperature", help="A temperature of the grid; can be repeated.")
    ] = None,
    alpha: Annotated[
        list[float] | None, typer.Option("-a", "--alpha", help="An alpha of the grid; can be repeated.")
    ] = None,
    by: Annotated[str, typer.Option(help="Criterion: nll of the labels, or kl to the teacher.")] = SEARCH_CRITERION,
    eta: Annotated[int, typer.Option(help="After each rung, one of ETA candidates continues.")] = SEARCH_ETA,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder of the search.")] = None,
    smoke: Smoke = False,
    yes: Yes = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Search T and alpha in short runs; an interrupted search continues when the command is repeated."""
    from ...recipe.load import load_recipe

    requested = overrides or []
    # The 4 steps of a smoke run are too few for the rungs.
    loaded = load_recipe(recipe, ["train.max_steps=16", *requested] if smoke else requested, smoke=smoke)
    is_main_process = not out.quiet
    out.quiet |= as_json
    confirm_downloads(recipe, loaded, yes)
    disable_library_progress_bars()
    from ...analysis.temperature_search import find_temperature
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        result = find_temperature(loaded, at, alpha, by, eta, output, progress.log_stage)
    if not is_main_process:
        return
    out.quiet = False
    plot = _plot(result)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result), indent=2) + "\n")
        return
    out.print(_table(result), *_summary(result), plot, sep="\n", highlight=False, markup=False, soft_wrap=True)
    command = ["hf-distill", "run", recipe, *requested, *result.overrides, *["--smoke"][: int(smoke)]]
    out.print(f"Train with these values: {shlex.join(command)}", soft_wrap=True, highlight=False, markup=False)


def _table(result: "SearchResult") -> Table:
    """Return a table of all candidates, with the winner in bold."""
    table = Table(title=f"Held-out rows, the best candidate by {result.by} first", box=None, pad_edge=False)
    for heading in ("T", "alpha", "steps", "NLL", "KL to teacher", "agreement", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for number, c in enumerate(result.candidates):
        last = c.rungs[-1]
        compared = ("-", "-") if last.kl is None else (f"{last.kl:.4f}", f"{last.agreement:.3f}")
        notes = ["recipe"][: int(c.from_recipe)] + ["front"][: int(c.name in result.pareto_front)]
        values = [f"{c.temperature:g}", f"{c.alpha:g}", f"{last.step}", f"{last.nll:.4f}", *compared]
        table.add_row(*values, ", ".join(notes), style="" if number else "bold")
    return table


def _summary(result: "SearchResult") -> list[str]:
    """Return sentences on the cost, the winner's lead, and the Pareto front."""
    lines = [f"Cost: {result.steps} steps, as many as {result.runs:.2f} full runs."]
    for second in result.candidates[1:2]:
        last = second.rungs[-1]
        winner = next(rung for rung in result.candidates[0].rungs if rung.step == last.step)
        lead = last.value(result.by) - winner.value(result.by)
        lines.append(f"At step {last.step} the winner leads the second by {lead:.4f} nats/token of {result.by}.")
    if len(result.pareto_front) > 1:
        other = "kl" if result.by == "nll" else "nll"
        lines.append(
            "NLL and KL disagree: no candidate beats one that is marked as front in both metrics, at the step where "
            f"that one stopped. To search by {other} instead, use --by {other} with another folder."
        )
    return lines


def _plot(result: "SearchResult") -> str:
    if not find_spec("matplotlib"):
        return 'There is no plot, because matplotlib is missing: pip install "hf-distill[report]", then repeat this.'
    from ...report import plots
    from ...report.figures import png

    return f"Plot: {png(plots.search(result), Path(result.folder) / 'temperature.png')}"
