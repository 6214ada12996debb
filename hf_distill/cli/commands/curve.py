"""The `curve` command: shows a run's quality over tokens, and its compute."""

import json
import sys
from dataclasses import asdict
from math import exp
from typing import Annotated

import typer
from rich.table import Table

from ...core import run_files
from ...core.defaults import PRETRAINING_TOKENS
from ..app import AsJson, RunFolder, app, out


@app.command()
def curve(
    run: RunFolder,
    pretraining_tokens: Annotated[
        float, typer.Option(help="Compare the compute with pretraining the student on this number of tokens.")
    ] = PRETRAINING_TOKENS,
    as_json: AsJson = False,
) -> None:
    """Show a run's quality over tokens, from its evaluations, and its compute compared with pretraining."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    from ...analysis.curve import data_curve
    from ...core.io import write_json

    result = data_curve(opened, pretraining_tokens)
    write_json(opened.folder / run_files.CURVE, asdict(result))
    if as_json:
        sys.stdout.write(json.dumps(asdict(result), indent=2) + "\n")
        return
    table = Table(title="Held-out rows", box=None, pad_edge=False)
    for heading in ("step", "tokens", "NLL", "perplexity", "KL to teacher", "share of the fall"):
        table.add_column(heading, justify="right")
    for point in result.points:
        kl = "-" if point.kl is None else f"{point.kl:.4f}"
        values = (f"{point.nll:.4f}", f"{exp(point.nll):.2f}", kl, f"{point.share:.1%}")
        table.add_row(f"{point.step}", f"{point.tokens:,}", *values)
    out.print(table)
    for share, tokens in result.reached.items():
        out.print(f"{share:.0%} of the fall in NLL was reached after {tokens:,} tokens", highlight=False)
    if result.hint:
        out.print(result.hint, highlight=False)
    c = result.compute
    out.print(
        f"Compute: {c.teacher + c.student:.3g} FLOP (teacher {c.teacher:.3g}, student {c.student:.3g}; {c.rule:.3g} by "
        f"the rule of thumb), which is {c.share:.2g} of pretraining the student on {c.pretraining_tokens:.3g} tokens",
        highlight=False,
    )
