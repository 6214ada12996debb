"""The `report` command: writes a run as one HTML page."""

from typing import Annotated

import typer

from ...core import run_files
from ...core.defaults import SAMPLE_TOKENS
from ..app import RunFolder, app, disable_library_progress_bars, out


@app.command()
def report(
    run: RunFolder,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of held-out rows that the models continue as samples; 0 writes none.")
    ] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each sample.")] = SAMPLE_TOKENS,
) -> None:
    """Write a run as one HTML page with its plots: RUN/report.html, RUN/figures/*.png."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    from ...errors import require_package
    from ...report.html import report as write_report
    from ...report.samples import write_samples
    from ..progress import RichProgress

    require_package("matplotlib", "report", "A report")
    disable_library_progress_bars()
    has_other_tokenizer = opened.recipe.is_cross_tokenizer
    with RichProgress(out) as progress:
        if samples and not opened.has(run_files.SAMPLES) and not has_other_tokenizer:
            write_samples(opened, samples, new_tokens=new_tokens, on_stage=progress.log_stage)
        written = write_report(opened, progress.log_stage)
    figures = written.path.parent / "figures"
    out.print(f"Wrote {written.path}, and {len(written.figures)} plots in {figures}", soft_wrap=True)
    if has_other_tokenizer:
        out.print(
            f"  Not in the report: {', '.join(written.missing)}; the commands that write them load both models with "
            "one tokenizer, and the teacher of this run has another (distill.cross_tokenizer)",
            soft_wrap=True,
            highlight=False,
        )
        return
    for section, command in written.missing.items():
        out.print(f"  Not in the report: {section}; `{command}` adds it", soft_wrap=True, highlight=False)
