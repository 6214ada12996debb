"""The `retention` command: scores the models of a run on evaluation tasks, relative to the teacher."""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...core.defaults import LM_EVAL_BATCH_ROWS
from ..app import AllowPickles, AsJson, RunFolder, TrustRemoteCode, app, disable_library_progress_bars, out

if TYPE_CHECKING:
    from ...analysis.evaluation import Retention


@app.command()
def retention(
    run: RunFolder,
    task: Annotated[
        list[str] | None, typer.Option(help="A task of the harness or of --tasks-folder; can be repeated.")
    ] = None,
    tasks_folder: Annotated[str | None, typer.Option(help="Folder of custom tasks in YAML.")] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="teacher, before, student or control; can be repeated.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Maximum number of examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Batch size of the harness.")] = LM_EVAL_BATCH_ROWS,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Score the student relative to its teacher on tasks of the lm-evaluation-harness, with intervals."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    opened.path("student")
    out.quiet |= as_json
    disable_library_progress_bars()
    from ...analysis.evaluation import retention_of
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        result = retention_of(opened, task, tasks_folder, model, limit, batch_size, progress.log_stage)
    if as_json:
        sys.stdout.write(json.dumps(asdict(result), indent=2) + "\n")
        return
    out.print(_scores(result))
    out.print()
    out.print(_relative_scores(result))
    out.print(
        "Intervals: 95 %, from a bootstrap over examples; each model is resampled together with its teacher.",
        style="dim",
    )


def _scores(result: "Retention") -> Table:
    models = [*result.tasks[0].scores]
    table = Table(title="Scores ± standard error", box=None, pad_edge=False)
    table.add_column("task")
    table.add_column("n", justify="right")
    for name in models:
        table.add_column(name, justify="right")
    for task in result.tasks:
        arrow = "" if task.higher_is_better else " ↓"
        values = [f"{score.value:.3f}±{score.stderr:.3f}" for score in task.scores.values()]
        table.add_row(task.task + arrow, f"{task.examples}", *values)
    return table


def _relative_scores(result: "Retention") -> Table:
    models = [name for name in result.tasks[0].scores if name != "teacher"]
    table = Table(title="% of the teacher's score", box=None, pad_edge=False)
    table.add_column("")
    for name in models:
        table.add_column(name, justify="right")
    rows = {task.task: [task.relative_scores.get(name) for name in models] for task in result.tasks}
    rows |= {f"· {title}": [scores.get(name) for name in models] for title, scores in result.categories.items()}
    for title, cells in rows.items():
        table.add_row(title, *("-" if c is None else f"{c.percent:.0f} [{c.low:.0f}, {c.high:.0f}]" for c in cells))
    return table
