"""The `inspect` command: measures a teacher's soft labels."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ...core import run_files
from ...core.defaults import HELD_OUT_TOKENS, NUM_CANDIDATE_IDS
from ...core.references import path_exists
from ...errors import DistillError
from ..app import (
    AllowPickles,
    AsJson,
    Overrides,
    Smoke,
    TrustRemoteCode,
    Yes,
    app,
    disable_library_progress_bars,
    out,
)
from ..confirm import confirm_downloads

if TYPE_CHECKING:
    from ...analysis.inspector import Inspection, Position


@app.command("inspect")
def inspect_command(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE|RUN", help="A recipe, or the folder of a run; a run gets an inspection.json."),
    ],
    overrides: Overrides = None,
    tokens: Annotated[
        int, typer.Option(min=1, help="Read batches up to this number of held-out tokens.")
    ] = HELD_OUT_TOKENS,
    position: Annotated[
        list[int] | None, typer.Option(min=0, help="Show the target token with this index; can be repeated.")
    ] = None,
    k: Annotated[
        int, typer.Option("-k", "--k", min=1, help="Number of likeliest ids shown at each position.")
    ] = NUM_CANDIDATE_IDS,
    smoke: Smoke = False,
    yes: Yes = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Measure a teacher's soft labels: entropy, mass, likeliest tokens, effect of T, suitable caches."""
    from ...recipe.load import load_recipe
    from ...runner.run_results import open_run

    run = open_run(recipe) if path_exists(recipe) and Path(recipe).is_dir() else None
    if run and (overrides or smoke):
        raise DistillError(
            f"{recipe} is the folder of a run, whose recipe cannot be changed: omit KEY=VALUE and --smoke, or give "
            f"{run.folder / run_files.RECIPE} with them."
        )
    loaded = run.recipe if run else load_recipe(recipe, overrides or [], smoke=smoke)
    out.quiet |= as_json
    if run is None:
        confirm_downloads(recipe, loaded, yes)
    disable_library_progress_bars()
    from ...analysis.inspector import inspect_teacher
    from ...analysis.model_pair import ModelPair
    from ...core.io import write_json
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        pair = (
            ModelPair.of_run(run, None, progress.log_stage) if run else ModelPair.of_recipe(loaded, progress.log_stage)
        )
        progress.log_stage(f"Measuring up to {tokens:,} held-out tokens")
        inspection = inspect_teacher(pair, tokens, position or None, k)
    if run:
        write_json(run.folder / run_files.INSPECTION, asdict(inspection))
    if as_json:
        sys.stdout.write(json.dumps(asdict(inspection), indent=2) + "\n")
        return
    for part in _render(inspection):
        out.print(part, highlight=False)


def _render(inspection: "Inspection") -> list[RenderableType]:
    parts = [_measurements(inspection), _histogram(inspection), _temperatures(inspection)]
    shown: list[RenderableType] = [*(x for part in parts for x in (part, ""))]
    for position in inspection.positions:
        title = Text.assemble((f"Token {position.index}", "bold"), f", entropy {position.entropy:.2f} nats, after\n")
        shown += [title.append(f"  …{position.context[-60:]!r}"), _likeliest(position), ""]
    return [*shown, _caches(inspection), _CACHE_LEGEND, "", _advice(inspection)]


def _table(title: str | None, *headings: str) -> Table:
    """Return a table without lines: the first column left-aligned, the others right-aligned."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _measurements(inspection: "Inspection") -> Table:
    table = _table(f"{inspection.tokens:,} held-out tokens, {inspection.vocab_size:,} ids, T = 1")
    ids = inspection.ids_for_99
    rows = [
        ("entropy", f"{inspection.entropy:.3f} nats = {inspection.entropy_bits:.3f} bits"),
        ("mass of the likeliest", ", ".join(f"{k}: {share:.1%}" for k, share in inspection.mass.items())),
        (
            "ids for 99 % of the mass",
            f"{ids['median']:,.0f} median, {ids['mean']:,.0f} mean, {ids['p90']:,.0f} 90th percentile",
        ),
        ("top-1 accuracy on the labels", f"{inspection.accuracy:.1%}"),
        (
            "cross entropy of the labels",
            f"{inspection.cross_entropy:.3f} nats (perplexity {inspection.perplexity:.2f})",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _histogram(inspection: "Inspection") -> Table:
    bins = [(low, count) for low, count in inspection.histogram]
    while len(bins) > 1 and not bins[-1][1]:
        bins.pop()
    largest = max(count for _, count in bins)
    table = _table("Tokens by entropy of the teacher, in nats", "from", "tokens", "share")
    table.add_column("", no_wrap=True)
    for low, count in bins:
        bar = "█" * round(40 * count / largest)
        table.add_row(f"{low:g}", f"{count:,}", f"{count / inspection.tokens:.1%}", bar)
    return table


def _temperatures(inspection: "Inspection") -> Table:
    table = _table("Effect of T", "T", "entropy, nats", *(f"top {k}" for k in inspection.mass), "")
    for effect in inspection.by_temperature:
        note = "← the recipe's" if effect.temperature == inspection.temperature else ""
        shares = (f"{share:.1%}" for share in effect.mass.values())
        table.add_row(f"{effect.temperature:g}", f"{effect.entropy:.3f}", *shares, note)
    return table


def _likeliest(position: "Position") -> Table:
    """Return the likeliest ids; the label is marked, and is the last row if it is not among them."""
    table = _table(None)
    for justify in ("left", "right", "left", "right", "left"):
        table.add_column(justify=justify, no_wrap=True)
    rows = [(c.is_target, n, c.text, c.probability) for n, c in enumerate(position.candidates, 1)]
    if not any(is_target for is_target, *_ in rows):
        rows.append((True, position.rank, position.target, position.target_probability))
    for is_target, number, text, p in rows:
        shown = repr(text) if len(repr(text)) <= 22 else f"{repr(text)[:20]}…'"
        style = "bold" if is_target else ""
        table.add_row("→" * is_target, f"{number:,}", Text(shown), f"{p:.2%}", "█" * round(30 * p), style=style)
    return table


def _caches(inspection: "Inspection") -> Table:
    headings = ("kind", "T", "bytes/token", "mass outside", "error", "error of the sum")
    table = _table("Caches of this teacher (hf-distill cache write)", *headings)
    for cache in inspection.caches:
        temperature = "any" if cache.temperature is None else f"{cache.temperature:g}"
        truncated_mass = f"{cache.truncated_mass:.1%}" if cache.kind == "top_k" else "-"
        errors = ("rounding", "") if cache.kind == "hidden" else (f"{cache.error:.3f}", f"{cache.error_of_sum:.3f}")
        table.add_row(cache.kind, temperature, f"{cache.bytes_per_token:,.1f}", truncated_mass, *errors)
    return table


_CACHE_LEGEND = (
    "error: |q - p| / |p| over all tokens, where the cache stores q for the teacher's\n"
    "p; error of the sum: the same for the sum over tokens, where sampling errors\n"
    "cancel."
)


def _advice(inspection: "Inspection") -> Table:
    table = Table(title="Advice", title_justify="left", box=None, pad_edge=False, show_header=False)
    for line in inspection.advice:
        table.add_row("·", Text(line))
    return table
