"""The commands cache write, import, texts, verify and push."""

from typing import TYPE_CHECKING, Annotated

import typer

from ...core.defaults import CACHE_DTYPE, CACHE_KIND, CACHE_SEED, SAMPLES_PER_TOKEN, SHARD_ROWS, TOP_K_IDS
from ...errors import DistillError
from ..app import AllowPickles, Overrides, Recipe, Smoke, TrustRemoteCode, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads

if TYPE_CHECKING:
    from ...cache import Manifest

caches = typer.Typer(
    help="Write, import, verify and push teacher caches for offline distillation.", no_args_is_help=True
)
app.add_typer(caches, name="cache")

Files = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="FILES", help="JSON Lines with the prompt_logprobs of vLLM, or Parquet files or folders of DistillKit."
    ),
]
Format = Annotated[
    str | None, typer.Option(help="vllm or distillkit; by default vllm for .jsonl files, else distillkit.")
]
Compression = Annotated[
    str | None,
    typer.Option(metavar="FILE", help="YAML file with DistillKit's compression; by default compression_config.yaml."),
]
VocabSize = Annotated[
    int | None, typer.Option(help="Ids that the teacher predicts; by default those of the model with the tokenizer.")
]


@caches.command()
def write(
    recipe: Recipe,
    overrides: Overrides = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder of the cache; by default teacher.path of the recipe.")
    ] = None,
    kind: Annotated[
        str, typer.Option(help="hidden (exact), sampled or top_k; `hf-distill plan` shows their sizes.")
    ] = CACHE_KIND,
    samples_per_token: Annotated[int, typer.Option(help="With --kind sampled: draws per token.")] = SAMPLES_PER_TOKEN,
    proposal_temperature: Annotated[
        float | None, typer.Option(help="With --kind sampled: temperature of the draws; by default that of the recipe.")
    ] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="With --kind top_k: ids per token.")] = TOP_K_IDS,
    dtype: Annotated[str, typer.Option(help="With --kind hidden: bfloat16, float16 or float32.")] = CACHE_DTYPE,
    seed: Annotated[int, typer.Option(help="With --kind sampled: seed of the draws.")] = CACHE_SEED,
    batch_size: Annotated[int | None, typer.Option(help="Rows per batch; by default that of the recipe.")] = None,
    shard_rows: Annotated[
        int, typer.Option(help="Rows per shard; an interruption loses at most one shard.")
    ] = SHARD_ROWS,
    smoke: Smoke = False,
    yes: Yes = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Write the teacher cache of a recipe; after an interruption, the same command continues."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    confirm_downloads(recipe, loaded, yes)
    from ...runner.cache_writer import write_recipe_cache
    from ...runner.model_loading import LoadPolicy, load_policy
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
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        folder, manifest = write_recipe_cache(loaded, output, progress.log_stage, progress.update_cache, **options)
    _print_size(str(folder), manifest)


def _print_size(folder: str, manifest: "Manifest") -> None:
    counts = f"{manifest.data['examples']:,} examples, {manifest.data['tokens']:,} tokens of kind {manifest.kind}"
    head = f", of which the output head takes {manifest.head['bytes'] / 2**20:.1f} MiB" if manifest.head else ""
    out.print(
        f"{folder}: {counts}, {manifest.bytes_per_token:.1f} bytes per token, {manifest.size / 2**20:.1f} MiB{head}",
        soft_wrap=True,
        highlight=False,
    )


@caches.command("import")
def import_(
    files: Files = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="Recipe that will be trained from the cache; it defines rows and tokenizer.")
    ] = ...,  # type: ignore[assignment]  # required
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder of the cache; by default teacher.path of the recipe.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Value of the recipe to override; may be repeated."),
    ] = None,
    format: Format = None,
    compression: Compression = None,
    k: Annotated[int | None, typer.Option("-k", "--k", help="Ids per token; by default all of the files.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Name of the teacher for the manifest; by default that of the recipe or files.")
    ] = None,
    vocab_size: VocabSize = None,
    allow_unused: Annotated[
        bool, typer.Option("--allow-unused", help="Skip records of texts that the recipe does not have.")
    ] = False,
    missing: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write the token ids of rows without a record to this file, and no cache."),
    ] = None,
    shard_rows: Annotated[
        int, typer.Option(help="Rows per shard; an interruption loses at most one shard.")
    ] = SHARD_ROWS,
    smoke: Smoke = False,
    yes: Yes = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Import published log-probabilities as the top_k teacher cache of a recipe."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    confirm_downloads(recipe, loaded, yes)
    from ...runner.cache_import import import_cache
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    disable_library_progress_bars()
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code)):
        summary = import_cache(
            loaded,
            files or [],
            output,
            missing_file=missing,
            on_stage=progress.log_stage,
            on_progress=progress.update_cache,
            format=format,
            compression=compression,
            k=k,
            teacher=teacher,
            vocab_size=vocab_size,
            allow_unused=allow_unused,
            shard_rows=shard_rows,
        )
    matches = summary.matches
    counts = f"{matches.records:,} records: {matches.unused:,} of other texts, {matches.duplicates:,} duplicates"
    normalized = f"; {matches.normalized:,} positions had approximate probabilities above 1 in sum, and were normalized"
    out.print(f"{counts}{normalized if matches.normalized else ''}", soft_wrap=True, highlight=False)
    if summary.manifest is None:
        out.print(
            f"{summary.missing:,} of {summary.rows:,} rows have no record. Their token ids are in {missing}: request "
            "their log-probabilities, and import them together with these files.",
            soft_wrap=True,
            highlight=False,
        )
        return
    _print_size(str(summary.folder), summary.manifest)


@caches.command()
def texts(
    files: Files = None,
    model: Annotated[
        str, typer.Option("--model", help="Id or path of a model with the tokenizer of the texts, such as the student.")
    ] = ...,  # type: ignore[assignment]  # required
    output: Annotated[str, typer.Option("-o", "--output", help="The .jsonl file to write.")] = ...,  # type: ignore[assignment]  # required
    format: Format = None,
    compression: Compression = None,
    vocab_size: VocabSize = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the texts of published log-probabilities as data for a recipe, for which they can then be imported."""
    from ...runner.cache_import import write_texts
    from ...runner.model_loading import LoadPolicy, load_policy
    from ..progress import RichProgress

    disable_library_progress_bars()
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code)):
        count = write_texts(
            files or [],
            output,
            model,
            on_stage=progress.log_stage,
            format=format,
            compression=compression,
            vocab_size=vocab_size,
        )
    out.print(f"{output}: {count:,} texts", soft_wrap=True, highlight=False)


@caches.command()
def verify(
    folder: Annotated[
        str, typer.Argument(metavar="FOLDER", help=r"Folder of a cache, or hf://datasets/org/name\[@revision].")
    ],
    against_teacher: Annotated[
        int | None, typer.Option(min=1, help="Run the teacher on this many examples and compare.")
    ] = None,
    teacher_url: Annotated[
        list[str] | None,
        typer.Option(help="With --against-teacher: URL of the teacher's server, if it is on one; may be repeated."),
    ] = None,
    api_key_env: Annotated[
        str | None, typer.Option(help="With --teacher-url: environment variable that holds the server's API key.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
) -> None:
    """Check the digest of every file of a cache, and optionally compare it with its teacher."""
    from ...cache import open_cache, verify_cache
    from ...cache.hub import resolve_cache_dir

    if (teacher_url and against_teacher is None) or (api_key_env and not teacher_url):
        raise DistillError("--teacher-url needs --against-teacher, and --api-key-env needs --teacher-url: add it.")
    cache_dir = resolve_cache_dir(folder)
    manifest = verify_cache(cache_dir)
    out.print(
        f"{cache_dir}: the digests of all {len(manifest.files)} files are correct.", soft_wrap=True, highlight=False
    )
    if imported := manifest.teacher.get("imported"):
        files = ", ".join(entry["file"] for entry in imported["files"])
        out.print(
            f"Imported from {imported['records']:,} records in {files} ({', '.join(imported['formats'])}).",
            soft_wrap=True,
            highlight=False,
        )
    if against_teacher is not None:
        from ...runner.cache_writer import verify_against_teacher
        from ...runner.model_loading import LoadPolicy, load_policy

        disable_library_progress_bars()
        with load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
            comparison = verify_against_teacher(
                open_cache(str(cache_dir)), against_teacher, url=teacher_url or (), api_key_env=api_key_env
            )
        out.print(
            f"The teacher's output equals the cache, byte for byte, for {comparison['identical']:.1%} of "
            f"{comparison['examples']:.0f} examples.",
            highlight=False,
        )


@caches.command()
def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of a cache.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Id of a dataset repository, org/name.")],
    private: Annotated[bool, typer.Option("--private", help="Create the repository as private.")] = False,
    replace: Annotated[
        bool, typer.Option("--replace", help="Replace another cache or other files in the repository.")
    ] = False,
) -> None:
    """Verify a cache and push it to the Hub as a dataset."""
    from ...cache.hub import push_cache

    out.print(f"Pushed to {push_cache(folder, repo, private, replace)}", soft_wrap=True, highlight=False)
