"""retention."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ..app import AsJson, RunFolder, app, disable_library_progress_bars, out


@app.command()
def retention(
    run: RunFolder,
    task: Annotated[list[str] | None, typer.Option(help="Of the harness, or of --tasks-folder; repeat it.")] = None,
    tasks_folder: Annotated[str | None, typer.Option(help="Of YAML tasks of your own.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="teacher, before, student, control; repeat it.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of each task at most.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 8,
    as_json: AsJson = False,
) -> None:
    """What the student kept of its teacher on tasks of the lm-evaluation-harness, with intervals."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    opened.path("student")
    out.quiet = as_json
    disable_library_progress_bars()
    from ...analysis.evaluation import retention_of
    from ..progress import RichProgress

    with RichProgress(out) as progress:
        found = retention_of(opened, task, tasks_folder, model, limit, batch_size, progress.stage)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    out.print(_scores(found))
    out.print()
    out.print(_kept(found))
    out.print("Intervals: 95 %, by a bootstrap over examples; each model is resampled with its teacher.", style="dim")


def _scores(found: Any) -> Table:
    models = [*found.tasks[0].scores]
    table = Table(title="Scores ± standard error", box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("n", justify="right")
    for name in models:
        table.add_column(name, justify="right")
    for task in found.tasks:
        arrow = "" if task.higher_is_better else " ↓"
        values = [f"{score.value:.3f}±{score.stderr:.3f}" for score in task.scores.values()]
        table.add_row(task.task + arrow, f"{task.examples}", *values)
    return table


def _kept(found: Any) -> Table:
    models = [name for name in found.tasks[0].scores if name != "teacher"]
    table = Table(title="% of the teacher's score", box=None, pad_edge=False)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    rows = [(task.task, task.kept) for task in found.tasks]
    rows += [(f"· {category}", kept) for category, kept in found.categories.items()]
    for title, kept in rows:
        cells = [kept.get(name) for name in models]
        table.add_row(title, *("-" if k is None else f"{k.percent:.0f} [{k.low:.0f}, {k.high:.0f}]" for k in cells))
    return table
