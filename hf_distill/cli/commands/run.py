"""The commands run and plan."""

import json
import os
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ...core import run_files
from ...core.defaults import (
    GENERATION_PROMPT_TOKENS,
    GPU_BANDWIDTH_TB_PER_SECOND,
    MODEL_FLOP_UTILIZATION,
    PEAK_TFLOPS,
    PRETRAINING_TOKENS,
)
from ...core.held_out_metrics import (
    CONTROL_TITLES,
    DEFAULT_TARGET,
    formatted,
    rows_with_teacher,
    shown_metrics,
)
from ...core.quantized_titles import with_quantization
from ...core.results import Metrics, StageFacts
from ..app import AllowPickles, Overrides, Recipe, Smoke, TrustRemoteCode, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads
from .publish import publish_run

if TYPE_CHECKING:
    from ...planning.planner import Plan


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the newest complete checkpoint.")] = False,
    yes: Yes = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickles: AllowPickles = False,
    no_self_check: Annotated[
        bool,
        typer.Option(
            "--no-self-check", help="Do not compare the loss of the first batch with a reference implementation."
        ),
    ] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="With train.push_to_hub: publish despite license conflicts.")
    ] = False,
) -> None:
    """Distill a teacher into a student: train, evaluate and write a run folder."""
    from ...recipe.load import load_recipe

    changed = [*(overrides or []), *(["train.self_check=false"] if no_self_check else [])]
    loaded = load_recipe(recipe, changed, smoke=smoke)
    confirm_downloads(recipe, loaded, yes, show=True)
    repo = str(loaded.train.hub_model_id) if loaded.train.push_to_hub else None
    if repo:
        from ...publishing import check_ready

        check_ready(loaded, repo, accept_license)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from ...core.io import read_results
    from ...recipe.tasks import target_noun
    from ...runner.early_stopping import stopping_note
    from ...runner.model_loading import LoadPolicy, load_policy
    from ...runner.run import run_recipe
    from ..progress import RichProgress

    disable_library_progress_bars()
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        result = run_recipe(loaded, resume, [progress], progress.log_stage, progress.update_generation)
    results = read_results(result.folder / run_files.RESULTS)
    quantized = loaded.student.quantize is not None
    out.print(results_table(result.models, results.get("chain"), target_noun(loaded), loaded.control, quantized))
    if note := stopping_note(results.get("steps", {})):
        out.print(note, soft_wrap=True, highlight=False)
    out.print(f"Run folder: {result.folder} (student: {result.folder / 'student'})", soft_wrap=True)
    if repo and not out.quiet:
        from ...runner.run_results import open_run

        private = bool(loaded.train.hub_private_repo)
        publish_run(open_run(result.folder), repo, private, (), None, accept_license)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Number of GPUs.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each GPU, in GiB.")] = 80.0,
    mfu: Annotated[
        float, typer.Option(help="Share of the peak that training reaches (model FLOP utilization).")
    ] = MODEL_FLOP_UTILIZATION,
    gpu_tflops: Annotated[
        float, typer.Option(help="Peak of a GPU in TFLOP/s; 989 is an H100 in bf16, dense.")
    ] = PEAK_TFLOPS,
    pretraining_tokens: Annotated[
        float, typer.Option(help="Number of tokens of a pretraining of the student to compare with.")
    ] = PRETRAINING_TOKENS,
    prompts: Annotated[
        int | None, typer.Option(help="Generation: number of prompts, if the recipe or its files do not give it.")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Generation: mean tokens of a prompt.")] = GENERATION_PROMPT_TOKENS,
    completion_tokens: Annotated[
        int | None, typer.Option(help="Generation: mean tokens of a completion. Default: generate.max_new_tokens.")
    ] = None,
    gpu_bandwidth: Annotated[
        float, typer.Option(help="Generation: memory bandwidth of a GPU in TB/s; 3.35 is an H100.")
    ] = GPU_BANDWIDTH_TB_PER_SECOND,
    tokens_per_second: Annotated[
        float | None, typer.Option(help="Generation with a server: tokens/s that it generates.")
    ] = None,
    smoke: Smoke = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON, in bytes and FLOP.")] = False,
) -> None:
    """Estimate memory, FLOP and hours of a recipe without downloading weights."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    from ...planning.generation import GenerationRates
    from ...planning.planner import plan as plan_recipe
    from ...recipe.load import recipes_by_stage

    rates = GenerationRates(prompts, prompt_tokens, completion_tokens, gpu_bandwidth, tokens_per_second)
    numbers = (gpus, gpu_memory, mfu, gpu_tflops, pretraining_tokens)
    plans = {name: plan_recipe(stage, *numbers, rates) for name, stage in recipes_by_stage(loaded).items()}
    plans |= {name: replace(plans[name], generation=None) for name in [*plans][1:]}  # a chain generates once
    if as_json:
        values = {name: asdict(plan) for name, plan in plans.items()}
        sys.stdout.write(json.dumps(values if loaded.stages else values[""], indent=2) + "\n")
        return
    for name, plan in plans.items():
        if name:
            out.rule(name)
        _print_plan(plan)


def _print_plan(plan: "Plan") -> None:
    from ...planning.render import caches_table, flops_table, legend, plan_table, verdict
    from ...planning.render_generation import generation_lines

    wide = out.width >= 120
    out.print(plan_table(plan, wide))
    out.print(*legend(plan, wide), sep="\n", highlight=False)
    out.print(flops_table(plan))
    for part in caches_table(plan):
        out.print(part, highlight=False)
    out.print(*generation_lines(plan.generation, plan.mfu), sep="\n", highlight=False)
    out.print(*verdict(plan), sep="\n", highlight=False)


def results_table(
    models: dict[str, Metrics],
    chain: list[StageFacts] | None = None,
    target: str = DEFAULT_TARGET,
    control: str | None = None,
    quantized: bool = False,
) -> Table:
    """Build the table of held-out metrics: teacher, student before and after training, control, or all stages.

    Args:
        models: name -> held-out metrics.
        chain: "chain" of the results of a progressive run.
        target: noun for a target of the models.
        control: `control` of the recipe.
        quantized: whether the student is quantized.
    """
    table, shown = Table(title="Metrics on held-out rows"), shown_metrics(models.values(), target)
    for heading in ("", *(metric.title for metric in shown)):
        table.add_column(heading, justify="right" if heading else "left")
    names = {"before": "student before", "student": "student after", "control": CONTROL_TITLES[control or "sft"]}
    names = with_quantization(names, quantized)
    if chain:
        names = {part["stage"]: f"{part['stage']}, {part['student']['layers']} layers" for part in chain}
        last = [part["stage"] for part in chain if part["stage"] != "direct"][-1]
        names = {{last: "student", "direct": "control"}.get(stage, stage): title for stage, title in names.items()}
    for title, metrics in rows_with_teacher(models, names, shown):
        table.add_row(title, *formatted(metrics, shown))
    return table
