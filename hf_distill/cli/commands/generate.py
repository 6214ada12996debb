"""The command generate: the teacher completes the prompts of a recipe."""

from typing import Annotated

import typer

from ..app import Overrides, Recipe, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads


@app.command()
def generate(
    recipe: Recipe,
    output: Annotated[str, typer.Option("-o", "--output", help="Folder of the data set.")],
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
    confirm_downloads(recipe, loaded, yes)
    from ...runner.generate import generate_data
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    disable_library_progress_bars()
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        data = generate_data(loaded, output, resume, progress.log_stage, progress.update_generation)
    out.print(
        f"{data.folder}: {data.rows:,} rows of {data.completions:,} completions with {data.tokens:,} tokens. Train on "
        f"them: hf-distill run {recipe} data.task.path={data.folder}",
        soft_wrap=True,
        highlight=False,
    )
