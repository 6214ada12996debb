"""The `draft` command: measures the student of a run as a draft model for speculative decoding."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...core.defaults import DRAFT_NEW_TOKENS, DRAFT_PROMPTS, DRAFTED_TOKENS
from ...core.pruned_sizes import millions
from ..app import AllowPickles, AsJson, RunFolder, TrustRemoteCode, app, disable_library_progress_bars, out

if TYPE_CHECKING:
    from ...analysis.draft import DraftMeasurement


@app.command()
def draft(
    run: RunFolder,
    prompts: Annotated[int, typer.Option(min=1, help="Number of held-out prompts.")] = DRAFT_PROMPTS,
    new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum number of tokens that are generated for each prompt.")
    ] = DRAFT_NEW_TOKENS,
    drafted_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that are drafted for each forward pass of the teacher.")
    ] = DRAFTED_TOKENS,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Measure the student as a draft model of its teacher: accepted tokens and speed of speculative decoding."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    opened.path("student")
    out.quiet |= as_json
    disable_library_progress_bars()
    from ...analysis.draft import measure_drafts_of
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        result = measure_drafts_of(opened, prompts, new_tokens, drafted_tokens, progress.log_stage)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result), indent=2) + "\n")
        return
    out.print(_table(result))
    out.print(
        "acceptance rate: probability that the teacher accepts a drafted token when it samples, over held-out tokens; "
        "accepted: drafted tokens that the teacher accepts in a forward pass, greedy; speed-up: relative to the "
        "teacher alone.",
        style="dim",
    )
    if different := [name for name, score in result.drafts.items() if score.equal_outputs < 1]:
        out.print(
            f"With {', '.join(different)} some outputs differ from those of the teacher alone, because rounding "
            "decides between tokens that are almost equally likely.",
            style="dim",
        )


def _table(result: "DraftMeasurement") -> Table:
    title = (
        f"{result.prompts} prompts, up to {result.new_tokens} new tokens, {result.drafted_tokens} drafted for each "
        "forward pass of the teacher"
    )
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("parameters", "acceptance rate", "accepted", "tokens/s", "speed-up"):
        table.add_column(heading, justify="right")
    alone = f"{result.teacher_tokens_per_second:.1f}"
    table.add_row("teacher alone", millions(result.teacher_parameters), "", "", alone, "")
    for name, score in result.drafts.items():
        table.add_row(
            f"with {name}",
            millions(score.parameters),
            f"{score.acceptance_rate:.1%}",
            f"{score.accepted_tokens:.2f} of {result.drafted_tokens}",
            f"{score.tokens_per_second:.1f}",
            f"{score.speedup:.2f}x",
        )
    return table
