"""curve."""

import json
import sys
from dataclasses import asdict
from math import exp
from typing import Annotated

import typer
from rich.table import Table

from ..app import AsJson, RunFolder, app, out


@app.command()
def curve(
    run: RunFolder,
    pretraining_tokens: Annotated[float, typer.Option(help="Compare with training the student on these.")] = 2e12,
    as_json: AsJson = False,
) -> None:
    """Quality over tokens, from a run's evaluations, and its operations beside pretraining."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    from ...analysis.curve import data_curve
    from ...core.io import write_json

    found = data_curve(opened, pretraining_tokens)
    write_json(opened.folder / "curve.json", asdict(found))
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    table = Table(title="Held-out rows", box=None, pad_edge=False)
    for heading in ("step", "tokens", "NLL", "perplexity", "KL to teacher", "of the fall"):
        table.add_column(heading, justify="right")
    for p in found.points:
        kl = "-" if p.kl is None else f"{p.kl:.4f}"
        table.add_row(f"{p.step}", f"{p.tokens:,}", f"{p.nll:.4f}", f"{exp(p.nll):.2f}", kl, f"{p.share:.1%}")
    out.print(table)
    for share, tokens in found.reached.items():
        out.print(f"{share:.0%} of the fall after {tokens:,} tokens", highlight=False)
    if found.hint:
        out.print(found.hint, highlight=False)
    c = found.compute
    out.print(
        f"Operations: {c.teacher + c.student:.3g} FLOP (teacher {c.teacher:.3g}, student {c.student:.3g}; {c.rule:.3g} "
        f"by the rule), {c.share:.2g} of pretraining the student on {c.pretraining_tokens:.3g} tokens",
        highlight=False,
    )
