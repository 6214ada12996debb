"""report."""

from typing import Annotated

import typer

from ..app import RunFolder, app, disable_library_progress_bars, out


@app.command()
def report(
    run: RunFolder,
    samples: Annotated[int, typer.Option(min=0, help="Let the models continue so many held-out rows; 0: none.")] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Of each sample.")] = 48,
) -> None:
    """One HTML page of a run, with its plots: RUN/report.html, RUN/figures/*.png."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    from ...errors import require_package
    from ...report.html import report as write_report
    from ...report.samples import write_samples
    from ..progress import RichProgress

    require_package("matplotlib", "report", "A report")
    disable_library_progress_bars()
    with RichProgress(out) as progress:
        if samples and not opened.has("samples.json"):
            write_samples(opened, samples, new_tokens=new_tokens, on_stage=progress.stage)
        found = write_report(opened, progress.stage)
    out.print(f"{found.path}, and {len(found.figures)} plots in {found.path.parent / 'figures'}", soft_wrap=True)
    for what, command in found.missing.items():
        out.print(f"  without {what}: `{command}` adds it", soft_wrap=True, highlight=False)
