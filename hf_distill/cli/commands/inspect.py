"""inspect."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from ...core.references import path_exists
from ...errors import DistillError
from ..app import AsJson, Overrides, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads


@app.command("inspect")
def inspect_command(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a run's folder: inspection.json is left there.")
    ],
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(min=1, help="Measure batches until so many tokens were asked.")] = 4096,
    position: Annotated[
        list[int] | None, typer.Option(min=0, help="Show this asked token; repeat it for more.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Likeliest ids of each position.")] = 10,
    smoke: Smoke = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """What a teacher's soft labels hold: entropy, mass, likeliest tokens, what T does, which cache fits."""
    from ...recipe.load import load_recipe
    from ...runner.run_results import open_run

    run = open_run(recipe) if path_exists(recipe) and Path(recipe).is_dir() else None
    if run and (overrides or smoke):
        raise DistillError(
            f"{recipe} is the folder of a run, whose recipe stands: leave KEY=VALUE and --smoke out, or give "
            f"{run.folder / 'recipe.yaml'} with them."
        )
    loaded = run.recipe if run else load_recipe(recipe, overrides or [], smoke=smoke)
    out.quiet = as_json
    if run is None:
        confirm_downloads(recipe, loaded, yes)
    disable_library_progress_bars()
    from ...analysis.inspector import inspect_teacher
    from ...analysis.model_pair import ModelPair
    from ...core.io import write_json
    from ..progress import RichProgress

    with RichProgress(out) as progress:
        pair = ModelPair.of_run(run, None, progress.stage) if run else ModelPair.of_recipe(loaded, progress.stage)
        progress.stage(f"Measuring up to {tokens:,} held-out tokens")
        found = inspect_teacher(pair, tokens, position or None, k)
    if run:
        write_json(run.folder / "inspection.json", asdict(found))
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    for part in _shown(found):
        out.print(part, highlight=False)


def _shown(found: Any) -> list[Any]:
    parts = [_measures(found), _histogram(found), _temperatures(found)]
    shown: list[Any] = [*(x for part in parts for x in (part, ""))]
    for position in found.positions:
        about = Text.assemble((f"Token {position.index}", "bold"), f", entropy {position.entropy:.2f} nats, after\n")
        shown += [about.append(f"  …{position.context[-60:]!r}"), _likeliest(position), ""]
    return [*shown, _caches(found), _LEGEND, "", _advice(found)]


def _table(title: str | None, *headings: str) -> Table:
    """A table without lines: the first column to the left, numbers to the right."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(headings))
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    return table


def _measures(found: Any) -> Table:
    table = _table(f"{found.tokens:,} held-out tokens, {found.vocab_size:,} ids, T = 1")
    needed = found.ids_for_99
    rows = [
        ("entropy", f"{found.entropy:.3f} nats = {found.entropy_bits:.3f} bits"),
        ("mass of the likeliest", ", ".join(f"{k}: {share:.1%}" for k, share in found.mass.items())),
        (
            "ids for 99 % of the mass",
            f"{needed['median']:,.0f} median, {needed['mean']:,.0f} mean, {needed['p90']:,.0f} 90th percentile",
        ),
        ("label is first choice", f"{found.accuracy:.1%}"),
        ("cross entropy of the labels", f"{found.cross_entropy:.3f} nats (perplexity {found.perplexity:.2f})"),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _histogram(found: Any) -> Table:
    bins = [(low, count) for low, count in found.histogram]
    while len(bins) > 1 and not bins[-1][1]:
        bins.pop()
    most = max(count for _, count in bins)
    table = _table("How unsure is it? Tokens by entropy, from nats", "from", "tokens", "share")
    table.add_column("", no_wrap=True)
    for low, count in bins:
        table.add_row(f"{low:g}", f"{count:,}", f"{count / found.tokens:.1%}", "█" * round(40 * count / most))
    return table


def _temperatures(found: Any) -> Table:
    table = _table("What T does", "T", "entropy, nats", *(f"top {k}" for k in found.mass), "")
    for at in found.by_temperature:
        own = "← the recipe's" if at.temperature == found.temperature else ""
        shares = (f"{share:.1%}" for share in at.mass.values())
        table.add_row(f"{at.temperature:g}", f"{at.entropy:.3f}", *shares, own)
    return table


def _likeliest(position: Any) -> Table:
    """The likeliest ids; the label is marked, and comes last if it is not among them."""
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


def _caches(found: Any) -> Table:
    headings = ("kind", "T", "bytes/token", "mass outside", "error", "error of the sum")
    table = _table("This teacher on disk (hf-distill cache write)", *headings)
    for cache in found.caches:
        at = "any" if cache.temperature is None else f"{cache.temperature:g}"
        lost = f"{cache.lost:.1%}" if cache.kind == "top_k" else "-"
        errors = ("rounding", "") if cache.kind == "hidden" else (f"{cache.error:.3f}", f"{cache.error_of_sum:.3f}")
        table.add_row(cache.kind, at, f"{cache.bytes_per_token:,.1f}", lost, *errors)
    return table


_LEGEND = (
    "error: |q - p| / |p|, where q is stored in the place of the teacher's p, token\n"
    "by token; of the sum over all tokens, where the errors of draws cancel."
)


def _advice(found: Any) -> Table:
    table = Table(title="What this means", title_justify="left", box=None, pad_edge=False, show_header=False)
    for line in found.advice:
        table.add_row("·", Text(line))
    return table
