"""The `report` command: writes a run as one HTML page."""

from typing import Annotated

import typer

from ...core import run_files
from ...core.defaults import SAMPLE_TOKENS
from ..app import AllowPickles, RunFolder, TrustRemoteCode, app, disable_library_progress_bars, out

_COMMANDS_FOR_ONE_TOKENIZER = tuple(f"hf-distill {name}" for name in ("inspect", "diagnose", "temperature"))


@app.command()
def report(
    run: RunFolder,
    samples: Annotated[
        int, typer.Option(min=0, help="Number of held-out rows that the models continue as samples; 0 writes none.")
    ] = 3,
    new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each sample.")] = SAMPLE_TOKENS,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Write a run as one HTML page with its plots: RUN/report.html, RUN/figures/*.png."""
    from ...runner.run_results import open_run

    opened = open_run(run)
    from ...errors import DistillError, require_package
    from ...report.html import report as write_report
    from ...report.samples import write_samples
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    require_package("matplotlib", "report", "A report")
    disable_library_progress_bars()
    reasons: dict[str, str] = {}  # of sections that are missing from the report
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        if samples and not opened.has(run_files.SAMPLES):
            try:
                write_samples(opened, samples, new_tokens=new_tokens, on_stage=progress.log_stage)
            except DistillError as error:
                reasons["generated samples"] = str(error)
        written = write_report(opened, progress.log_stage)
    figures = written.path.parent / "figures"
    out.print(f"Wrote {written.path}, and {len(written.figures)} plots in {figures}", soft_wrap=True)
    for section, command in written.missing.items():
        reason = reasons.get(section)
        if opened.recipe.is_cross_tokenizer and command.startswith(_COMMANDS_FOR_ONE_TOKENIZER):
            reason = "it is for models of one tokenizer, and the teacher has another (distill.cross_tokenizer)"
        out.print(
            f"  Not in the report: {section}; {reason or f'`{command}` adds it'}",
            soft_wrap=True,
            highlight=False,
            markup=False,
        )
