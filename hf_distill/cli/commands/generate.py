"""The command generate: the teacher completes the prompts of a recipe."""

import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ...errors import DistillError
from ..app import AllowPickles, Overrides, Recipe, Smoke, TrustRemoteCode, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads

if TYPE_CHECKING:
    from ...recipe.data import Source


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
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
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
    train = _training_command(recipe, overrides or [], output, smoke, loaded.data.task)
    out.print(
        f"Train on {'the' if written else 'the complete'} data: {train}", soft_wrap=True, highlight=False, markup=False
    )
    for data in written:
        if data.cache is not None:
            teacher = f"teacher='{{kind: cached, path: {data.cache}}}'"
            text = f"{data.cache}: the teacher cache. With soft labels: {train} {teacher}"
            out.print(text, soft_wrap=True, highlight=False, markup=False)


def _training_command(recipe: str, overrides: Sequence[str], output: str | None, smoke: bool, task: "Source") -> str:
    """Return the command that trains on the data, with the overrides that affect the training.

    Args:
        recipe: the recipe.
        overrides: the overrides of the generation.
        output: the folder of the data set; None: those of the sources with generate: true.
        smoke: whether the recipe is reduced to a smoke run.
        task: the source that the data set replaces; its keys that choose prompts do not apply to the data set.
    """
    if output is None:
        kept_overrides = [*overrides]
    else:
        replaced = ("generate", "data.task.path", "data.task.column", "data.task.generate")
        kept_overrides = [
            each for each in overrides if each.partition("=")[0] not in replaced and each[:9] != "generate."
        ]
        kept_overrides += [f"data.task.path={output}", *(["data.task.column=null"] if task.column is not None else [])]
        kept_overrides += ["data.task.generate=false"] if task.generate else []
    return shlex.join(["hf-distill", "run", recipe, *kept_overrides, *(["--smoke"] if smoke else [])])
