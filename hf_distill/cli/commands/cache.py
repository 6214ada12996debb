"""cache write, verify, push."""

import os
from typing import Annotated

import typer

from ..app import Overrides, Recipe, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads

caches = typer.Typer(help="Write what a teacher says to disk, once; check it; push it.", no_args_is_help=True)
app.add_typer(caches, name="cache")


@caches.command()
def write(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder; else the recipe's teacher.path.")
    ] = None,
    kind: Annotated[str, typer.Option(help="hidden (exact), sampled or top_k.")] = "hidden",
    samples_per_token: Annotated[int, typer.Option(help="Of sampled: of each token.")] = 12,
    proposal_temperature: Annotated[
        float | None, typer.Option(help="Of sampled: temperature drawn at; else the recipe's.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Of top_k: ids of each token.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of hidden: bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch; else the recipe's.")] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard: what is lost at most if it is killed.")] = 256,
    smoke: Smoke = False,
    yes: Yes = False,
) -> None:
    """Write what a recipe's teacher says of its data; run it again after a crash, and it goes on."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    confirm_downloads(recipe, loaded, yes)
    out.quiet = os.environ.get("RANK", "0") != "0"
    from ...runner.cache_writer import write_recipe_cache
    from ..progress import RichProgress

    disable_library_progress_bars()
    options = {
        "kind": kind,
        "samples_per_token": samples_per_token,
        "proposal_temperature": proposal_temperature,
        "k": k,
        "dtype": dtype,
        "seed": seed,
    }
    options |= {"shard_rows": shard_rows} | ({} if batch_size is None else {"batch_size": batch_size})
    with RichProgress(out) as progress:
        folder, manifest = write_recipe_cache(loaded, output, progress.stage, progress.stored, **options)
    counts = f"{manifest.data['examples']:,} examples, {manifest.data['tokens']:,} tokens of kind {manifest.kind}"
    head = f", of which the output head takes {manifest.head['bytes'] / 2**20:.1f} MiB" if manifest.head else ""
    out.print(
        f"{folder}: {counts}, {manifest.bytes_per_token:.1f} bytes a token, {manifest.size / 2**20:.1f} MiB{head}",
        soft_wrap=True,
        highlight=False,
    )


@caches.command()
def verify(
    folder: Annotated[str, typer.Argument(help="Of a cache, or hf://datasets/org/name[@revision].")],
    against_teacher: Annotated[
        int | None, typer.Option(min=1, help="Ask the teacher again about so many examples.")
    ] = None,
) -> None:
    """Check every file of a cache, and whether its teacher still says the same."""
    from ...cache import open_cache, verify_cache
    from ...cache.hub import resolve_cache_dir

    place = resolve_cache_dir(folder)
    manifest = verify_cache(place)
    out.print(f"{place}: {len(manifest.files)} files are what was written.", soft_wrap=True, highlight=False)
    if against_teacher is not None:
        from ...runner.cache_writer import verify_against_teacher

        disable_library_progress_bars()
        found = verify_against_teacher(open_cache(str(place)), against_teacher)
        out.print(
            f"Of {found['examples']:.0f} examples the teacher says now, to the byte, what is stored of "
            f"{found['identical']:.1%}.",
            highlight=False,
        )


@caches.command()
def push(
    folder: Annotated[str, typer.Argument(help="Of a cache.")],
    repo: Annotated[str, typer.Argument(help="org/name of a data set repository.")],
    private: Annotated[bool, typer.Option("--private", help="Of a new one.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace another cache, or files of somebody else, that are there.")
    ] = False,
) -> None:
    """Check a cache and upload it to the Hub as a data set."""
    from ...cache.hub import push_cache

    out.print(f"Pushed: {push_cache(folder, repo, private, replace)}", soft_wrap=True, highlight=False)
