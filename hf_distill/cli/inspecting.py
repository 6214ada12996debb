"""inspect."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from .app import AsJson, Overrides, Smoke, app, no_other_bars, out


@app.command("inspect")
def inspect_command(
    recipe: Annotated[str, typer.Argument(help="A recipe, or the folder of a run, where inspection.json is left.")],
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(min=1, help="Look at so many held-out tokens.")] = 4096,
    position: Annotated[list[int] | None, typer.Option(min=0, help="Show this asked token; may be repeated.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", min=1, help="Ids of each position.")] = 8,
    smoke: Smoke = False,
    as_json: AsJson = False,
) -> None:
    """What a teacher's soft labels hold: entropy, mass, its likeliest tokens, the effect of T."""
    from ..analysis.folder import open_run
    from ..recipe.load import load_recipe

    run = open_run(recipe) if Path(recipe).is_dir() else None
    loaded = run.recipe if run else load_recipe(recipe, overrides or [], smoke=smoke)
    no_other_bars()
    from ..analysis.inspector import inspect_teacher
    from ..analysis.pair import Pair
    from ..evidence import write_json
    from ..progress import RichProgress

    out.quiet = as_json
    with RichProgress(out) as progress:
        pair = Pair.of_run(run, on_stage=progress.stage) if run else Pair.of_recipe(loaded, progress.stage)
        progress.stage(f"Looking at {tokens:,} tokens")
        found = inspect_teacher(pair, tokens, position or (8, 64, 128), k)
    if run:
        write_json(run.folder / "inspection.json", asdict(found))
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    for part in _shown(found):
        out.print(part, highlight=False)


def _shown(found: Any) -> list[Any]:
    counts = [
        f"{found.tokens:,} held-out tokens, {found.vocab_size:,} ids, at T = 1:",
        f"  entropy {found.entropy:.3f} nats ({found.entropy_bits:.3f} bits) a token",
        "  mass    " + ", ".join(f"top {k}: {share:.1%}" for k, share in found.mass.items()),
        f"  99 % of the mass: {found.ids_for_99['median']:,.0f} ids (median), {found.ids_for_99['mean']:,.0f} (mean), "
        f"{found.ids_for_99['p90']:,.0f} (90th percentile)",
        f"  labels  first choice {found.accuracy:.1%}, perplexity {found.perplexity:.2f}",
        "",
    ]
    return [*counts, _histogram(found), "", _temperatures(found), "", *_positions(found), _caches(found), "",
            *(f"· {line}" for line in found.advice)]  # fmt: skip


def _histogram(found: Any) -> Table:
    table = Table(title="Entropy of the teacher, nats", box=None, pad_edge=False)
    table.add_column("from", justify="right")
    table.add_column("tokens", justify="right")
    table.add_column("")
    most = max(count for _, count in found.histogram) or 1
    for low, count in found.histogram:
        table.add_row(f"{low:g}", f"{count:,}", "█" * round(40 * count / most))
    return table


def _temperatures(found: Any) -> Table:
    table = Table(title="What T does", box=None, pad_edge=False)
    table.add_column("T", justify="right")
    table.add_column("entropy, nats", justify="right")
    for k in found.mass:
        table.add_column(f"top {k}", justify="right")
    for at in found.by_temperature:
        table.add_row(f"{at.temperature:g}", f"{at.entropy:.3f}", *(f"{share:.1%}" for share in at.mass.values()))
    return table


def _positions(found: Any) -> list[Any]:
    parts: list[Any] = []
    for position in found.positions:
        about = f"Token {position.index}, after {position.context[-50:]!r}: entropy {position.entropy:.2f} nats"
        parts.append(Text(about, "bold"))
        for candidate in position.candidates:
            mark = "→" if candidate.is_target else " "
            bar = "█" * round(30 * candidate.probability)
            parts.append(Text(f"  {mark} {candidate.probability:6.2%}  {candidate.text!r:<18} {bar}"))
        if not any(candidate.is_target for candidate in position.candidates):
            rest = f"  → {position.target_probability:6.2%}  {position.target!r} is number {position.rank:,}"
            parts.append(Text(rest))
        parts.append("")
    return parts


def _caches(found: Any) -> Table:
    table = Table(title="This teacher on disk (hf-distill cache write)", box=None, pad_edge=False)
    table.add_column("kind")
    for heading in ("bytes a token", "mass outside", "cosine of a token's"):
        table.add_column(heading, justify="right")
    for cache in found.caches:
        table.add_row(cache.kind, f"{cache.bytes_per_token:,.1f}", f"{cache.lost:.2%}", f"{cache.cosine:.4f}")
    return table
