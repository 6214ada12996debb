"""The command generate: the teacher completes the prompts of a recipe."""

from typing import Annotated

import typer

from ...errors import DistillError
from ..app import Overrides, Recipe, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads


@app.command()
def generate(
    recipe: Recipe,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder of the data set of all sources. Without it, the sources with generate: true are generated for "
            "`hf-distill run`.",
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Generate the parts that are missing in the folder.")
    ] = False,
    smoke: Smoke = False,
    yes: Yes = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Allow Python code from the repositories of the models.")
    ] = False,
    allow_pickles: Annotated[
        bool,
        typer.Option("--allow-pickles", help="Allow pickled weights; loading them can run arbitrary code."),
    ] = False,
) -> None:
    """Let the teacher complete the prompts of a recipe, and write a data set to train on (sequence-level KD)."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    if output is None and not loaded.data.generated:
        raise DistillError(
            "The data set needs a folder, and none is given: pass -o FOLDER; or set data.task.generate to true, and "
            "`hf-distill run` generates it first."
        )
    confirm_downloads(recipe, loaded, yes)
    from ...runner.generate import generate_data
    from ...runner.generation_phase import generate_sources
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    disable_library_progress_bars()
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        shown = (progress.log_stage, progress.update_generation)
        written = [generate_data(loaded, output, resume, *shown)] if output else generate_sources(loaded, *shown)
    for data in written:
        counts = f"{data.rows:,} rows of {data.completions:,} completions with {data.tokens:,} tokens"
        out.print(f"{data.folder}: {counts}", soft_wrap=True, highlight=False)
    train = f"hf-distill run {recipe} data.task.path={output}" if output else f"hf-distill run {recipe}"
    out.print(f"Train on {'the' if written else 'the complete'} data: {train}", soft_wrap=True, highlight=False)
    for data in written:
        if data.cache is not None:
            teacher = f"teacher='{{kind: cached, path: {data.cache}}}'"
            out.print(
                f"{data.cache}: the teacher cache. With soft labels: {train} {teacher}", soft_wrap=True, highlight=False
            )
