"""temperature."""

import json
import sys
from dataclasses import asdict
from importlib.util import find_spec
from typing import Annotated

import typer
from rich.table import Table

from .app import AsJson, Overrides, Recipe, Smoke, app, no_other_bars, out


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
    as_json: AsJson = False,
) -> None:
    """Search T and alpha in short runs; run it again after a crash, and it goes on."""
    from ..recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    out.quiet = as_json
    no_other_bars()
    from ..analysis.canvas import png
    from ..analysis.plots import search
    from ..analysis.temperature import find_temperature
    from ..progress import RichProgress

    with RichProgress(out) as progress:
        found = find_temperature(loaded, at, alpha, by, eta, output, progress.stage)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found) | {"folder": str(found.folder)}, indent=2) + "\n")
        return
    table = Table(title=f"Held-out rows, the best by {found.by} first", box=None, pad_edge=False)
    for heading in ("T", "alpha", "steps", "NLL", "KL to teacher", "agreement"):
        table.add_column(heading, justify="right")
    for c in found.candidates:
        last = c.rungs[-1]
        values = [f"{c.temperature:g}", f"{c.alpha:g}", f"{last.step}", f"{last.nll:.4f}", f"{last.kl:.4f}"]
        table.add_row(*values, f"{last.agreement:.3f}", style="bold" if c is found.candidates[0] else "")
    out.print(table)
    out.print(f"Cost: {found.steps} steps, those of {found.runs:.2f} whole runs.", highlight=False)
    if find_spec("matplotlib"):
        out.print(
            f"Plot: {png(search(asdict(found)), found.folder / 'temperature.png')}", soft_wrap=True, highlight=False
        )
    else:
        out.print('Plot: pip install "hf-distill[report]", and run this again.', highlight=False, markup=False)
    out.print(f"Take it: hf-distill run {recipe} {' '.join(found.overrides)}", soft_wrap=True, highlight=False)
