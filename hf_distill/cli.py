"""The command line: the one place that prints. Exit codes: 0 done, 1 the run failed, 2 the input was wrong."""

import json
import os
import sys
import traceback
import warnings
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .errors import DistillError

app = typer.Typer(
    name="hf-distill",
    help="Distil language models with the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
recipes = typer.Typer(help="Look at recipes and check them.", no_args_is_help=True)
app.add_typer(recipes, name="recipes")
caches = typer.Typer(help="Write what a teacher says to disk, once; check it; push it.", no_args_is_help=True)
app.add_typer(caches, name="cache")

_Recipe = Annotated[str, typer.Argument(help="A .yaml file, or the name of a packaged recipe.")]
_Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.max_steps=20.")]
_Smoke = Annotated[bool, typer.Option("--smoke", help="Tiny random models of the same families: proves the plumbing.")]

out = Console()


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Say the version.")] = False) -> None:
    if version:
        from .version import __version__

        out.print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: _Recipe,
    overrides: _Overrides = None,
    smoke: _Smoke = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
) -> None:
    """Distil: load, train, evaluate, leave a run folder."""
    from .recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    out.quiet = os.environ.get("RANK", "0") != "0"  # one of several processes speaks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from .progress import RichProgress
    from .recipe.run import run_recipe

    disable_progress_bars()
    logging.disable_progress_bar()
    # Between libraries, at each collective of a step; nothing that the reader could change.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed|transformers\.")
    with RichProgress(out) as progress:
        result = run_recipe(loaded, resume=resume, callbacks=[progress], on_stage=progress.stage)
    out.print(results_table(result.models))
    out.print(f"Run folder: {result.folder} (the student: {result.folder / 'student'})", soft_wrap=True)


@app.command()
def plan(
    recipe: _Recipe,
    overrides: _Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs there are.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, in GiB.")] = 80.0,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    gpu_tflops: Annotated[float, typer.Option(help="Peak of a GPU in TFLOP/s; 989: H100, bf16, dense.")] = 989.0,
    pretraining_tokens: Annotated[float, typer.Option(help="Compare with training the student on these.")] = 2e12,
    smoke: _Smoke = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan, in bytes and FLOP.")] = False,
) -> None:
    """Memory, operations and hours of a recipe, before they are paid for; no weights are downloaded."""
    from .recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    from .analysis.planner import plan as plan_recipe
    from .analysis.show import caches_table, flops_table, legend, plan_table, verdict

    found = plan_recipe(loaded, gpus, gpu_memory, mfu, gpu_tflops, pretraining_tokens)
    if as_json:
        sys.stdout.write(json.dumps(asdict(found), indent=2) + "\n")
        return
    wide = out.width >= 120
    out.print(plan_table(found, wide))
    out.print(*legend(found, wide), sep="\n", highlight=False)
    out.print(flops_table(found))
    out.print(*caches_table(found), sep="\n", highlight=False)
    out.print(*verdict(found), sep="\n", highlight=False)


def results_table(models: dict[str, dict[str, float]]) -> Table:
    """Teacher, student before and after, and control, side by side."""
    table = Table(title="Held-out text")
    for heading in ("", "perplexity", "KL to teacher (nats/token)", "top-1 agreement"):
        table.add_column(heading, justify="right" if heading else "left")
    names = {"before": "student before", "student": "student after", "control": "control, hard labels alone"}
    if "teacher_perplexity" in models["student"]:
        table.add_row("teacher", f"{models['student']['teacher_perplexity']:.2f}", "0", "1")
    for key, name in names.items():
        m = models.get(key, {})
        if "perplexity" in m:  # with alpha 0 nothing is measured before
            compared = (f"{m['kl']:.4f}", f"{m['agreement']:.3f}") if "kl" in m else ("-", "-")
            table.add_row(name, f"{m['perplexity']:.2f}", *compared)
    return table


@recipes.command("list")
def list_command() -> None:
    """Packaged recipes, each with its first line."""
    from .recipe.load import list_recipes

    table = Table(box=None, show_header=False)
    for name, title in list_recipes().items():
        table.add_row(f"[bold]{name}[/bold]", title)
    out.print(table)


@recipes.command()
def show(recipe: _Recipe) -> None:
    """The YAML of a recipe; raw where it is piped."""
    from .recipe.load import recipe_text

    text = recipe_text(recipe)
    if out.is_terminal:
        from rich.syntax import Syntax

        out.print(Syntax(text, "yaml", background_color="default"))
    else:
        sys.stdout.write(text)


@recipes.command()
def validate(recipe: _Recipe, overrides: _Overrides = None, smoke: _Smoke = False) -> None:
    """Check a recipe without loading anything."""
    from .recipe.load import load_recipe

    load_recipe(recipe, overrides or [], smoke=smoke)
    out.print(f"{recipe} is a valid recipe.")


@recipes.command()
def preview(
    recipe: _Recipe,
    overrides: _Overrides = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 3,
    smoke: _Smoke = False,
) -> None:
    """The first rows of a recipe as training sees them: what is asked is green, or between «» where it is piped."""
    from .recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    from datasets import disable_progress_bars

    from .recipe.preview import preview_rows

    disable_progress_bars()
    for document in preview_rows(loaded, rows):
        counts = f"row {document.row} · {document.source} · {document.tokens} tokens · {document.asked} asked"
        out.print(counts, style="bold", highlight=False)
        if out.is_terminal:
            out.print(Text.assemble(*((text, "green" if asked else "dim") for text, asked in document.spans)))
        else:
            sys.stdout.write("".join(f"«{text}»" if asked else text for text, asked in document.spans) + "\n")


@recipes.command()
def schema() -> None:
    """The JSON Schema of recipes, for editors."""
    from .recipe.schema import packaged_schema

    sys.stdout.write(json.dumps(packaged_schema(), indent=2) + "\n")


@caches.command()
def write(
    recipe: _Recipe,
    overrides: _Overrides = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", help="Folder; else the recipe's teacher.path.")
    ] = None,
    kind: Annotated[str, typer.Option(help="hidden (exact), sampled or top_k.")] = "hidden",
    draws: Annotated[int, typer.Option(help="Of sampled: of each token.")] = 12,
    proposal: Annotated[float | None, typer.Option(help="Of sampled: temperature drawn at; else the recipe's.")] = None,
    k: Annotated[int, typer.Option("-k", "--k", help="Of top_k: ids of each token.")] = 64,
    dtype: Annotated[str, typer.Option(help="Of hidden: bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    batch_size: Annotated[int | None, typer.Option(help="Rows of a batch; else the recipe's.")] = None,
    shard_rows: Annotated[int, typer.Option(help="Rows of a shard: what is lost at most if it is killed.")] = 256,
    smoke: _Smoke = False,
) -> None:
    """Write what a recipe's teacher says of its data; run it again after a crash, and it goes on."""
    from .recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    out.quiet = os.environ.get("RANK", "0") != "0"
    from datasets import disable_progress_bars
    from transformers.utils import logging

    from .progress import RichProgress
    from .recipe.caching import write_recipe_cache

    disable_progress_bars()
    logging.disable_progress_bar()
    options = {"kind": kind, "draws": draws, "proposal": proposal, "k": k, "dtype": dtype, "seed": seed}
    options |= {"shard_rows": shard_rows} | ({} if batch_size is None else {"batch_size": batch_size})
    with RichProgress(out) as progress:
        folder, manifest = write_recipe_cache(loaded, output, progress.stage, progress.stored, **options)
    counts = f"{manifest.data['examples']:,} examples, {manifest.data['tokens']:,} tokens of kind {manifest.kind}"
    out.print(
        f"{folder}: {counts}, {manifest.bytes_per_token:.1f} bytes a token, {manifest.payload / 2**20:.1f} MiB",
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
    from .cache import check_all, open_cache
    from .cache.hub import folder_of

    place = folder_of(folder)
    manifest = check_all(place)
    out.print(f"{place}: {len(manifest.files)} files are what was written.", soft_wrap=True, highlight=False)
    if against_teacher is not None:
        from datasets import disable_progress_bars
        from transformers.utils import logging

        from .recipe.caching import compare_with_teacher

        disable_progress_bars()
        logging.disable_progress_bar()
        found = compare_with_teacher(open_cache(str(place)), against_teacher)
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
) -> None:
    """Check a cache and upload it to the Hub as a data set."""
    from .cache.hub import push_cache

    out.print(f"Pushed: {push_cache(folder, repo, private)}", soft_wrap=True, highlight=False)


def main() -> None:
    """Run the program; wrong input is told in words, with exit code 2."""
    try:
        app()
    except DistillError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a machine see the same
            Console(stderr=True).print(Text("Error: ", "bold red").append(str(error), "default"), soft_wrap=True)
        sys.exit(2)
    except Exception:
        traceback.print_exc()
        sys.exit(1)
