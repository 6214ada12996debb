"""temperature."""

import json
import os
import sys
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..app import AsJson, Overrides, Recipe, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads


@app.command()
def temperature(
    recipe: Recipe,
    overrides: Overrides = None,
    at: Annotated[list[float] | None, typer.Option("-t", "--temperature", help="Repeat it for more.")] = None,
    alpha: Annotated[list[float] | None, typer.Option("-a", "--alpha", help="Repeat it for more.")] = None,
    by: Annotated[str, typer.Option(help="Judge by nll of the labels, or by kl to the teacher.")] = "nll",
    eta: Annotated[int, typer.Option(help="One of so many candidates goes on.")] = 2,
    output: Annotated[str | None, typer.Option("-o", "--output", help="Folder of the search.")] = None,
    smoke: Smoke = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Search T and alpha in short runs; run it again after a crash, and it goes on."""
    from ...recipe.load import load_recipe

    given = overrides or []
    # A smoke run's own 4 steps are too few for the rungs.
    loaded = load_recipe(recipe, ["train.max_steps=16", *given] if smoke else given, smoke=smoke)
    speaks = os.environ.get("RANK", "0") == "0"  # one of several processes
    out.quiet = as_json or not speaks
    confirm_downloads(recipe, loaded, yes)
    disable_library_progress_bars()
    from ...analysis.temperature_search import find_temperature
    from ..progress import RichProgress

    with RichProgress(out) as progress:
        found = find_temperature(loaded, at, alpha, by, eta, output, progress.stage)
    if not speaks:
        return
    out.quiet = False
    plot = _plot(found)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    out.print(_table(found), *_words(found), plot, sep="\n", highlight=False, markup=False, soft_wrap=True)
    command = ["hf-distill run", recipe, *given, *found.overrides, *["--smoke"][: int(smoke)]]
    out.print(f"Take it: {' '.join(command)}", soft_wrap=True, highlight=False, markup=False)


def _table(found: Any) -> Table:
    """All candidates; the winner is bold."""
    table = Table(title=f"Held-out rows, the best by {found.by} first", box=None, pad_edge=False)
    for heading in ("T", "alpha", "steps", "NLL", "KL to teacher", "agreement", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for number, c in enumerate(found.candidates):
        last = c.rungs[-1]
        compared = ("-", "-") if last.kl is None else (f"{last.kl:.4f}", f"{last.agreement:.3f}")
        notes = ["the recipe's own"][: int(c.own)] + ["front"][: int(c.name in found.pareto_front)]
        values = [f"{c.temperature:g}", f"{c.alpha:g}", f"{last.step}", f"{last.nll:.4f}", *compared]
        table.add_row(*values, ", ".join(notes), style="" if number else "bold")
    return table


def _words(found: Any) -> list[str]:
    """What the table means, and what it cost."""
    words = [f"Cost: {found.steps} steps, those of {found.runs:.2f} whole runs."]
    for second in found.candidates[1:2]:
        last = second.rungs[-1]
        met = next(rung for rung in found.candidates[0].rungs if rung.step == last.step)
        lead = last.value(found.by) - met.value(found.by)
        words.append(f"The last choice, at step {last.step}: ahead by {lead:.4f} nats/token of {found.by}.")
    if len(found.pareto_front) > 1:
        other = "kl" if found.by == "nll" else "nll"
        words.append(
            f"NLL and KL disagree: no candidate beats one of the front in both, at the steps where it stopped. What "
            f"{other} would choose: --by {other}, in another folder."
        )
    return words


def _plot(found: Any) -> str:
    if not find_spec("matplotlib"):
        return 'Plot: pip install "hf-distill[report]", and run this again.'
    from ...report import plots
    from ...report.figures import png

    return f"Plot: {png(plots.search(asdict(found)), Path(found.folder) / 'temperature.png')}"
