"""run and plan."""

import json
import os
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Table

from ..app import Overrides, Recipe, Smoke, Yes, app, disable_library_progress_bars, out
from ..confirm import confirm_downloads
from .publish import publish_run


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest whole checkpoint.")] = False,
    yes: Yes = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the models' repositories run Python of their own.")
    ] = False,
    allow_pickles: Annotated[
        bool,
        typer.Option("--allow-pickles", help="Read pickled weights: reading can run what is inside."),
    ] = False,
    no_self_check: Annotated[
        bool, typer.Option("--no-self-check", help="Do not compare the first batch's loss with a plain reference.")
    ] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="With train.push_to_hub: publish against what licences say.")
    ] = False,
) -> None:
    """Distil: load, train, evaluate, leave a run folder."""
    from ...recipe.load import load_recipe

    changed = [*(overrides or []), *(["train.self_check=false"] if no_self_check else [])]
    loaded = load_recipe(recipe, changed, smoke=smoke)
    out.quiet = os.environ.get("RANK", "0") != "0"  # one of several processes speaks
    confirm_downloads(recipe, loaded, yes, show=True)
    to = str(loaded.train.hub_model_id) if loaded.train.push_to_hub else None
    if to:
        from ...publishing import check_ready

        check_ready(loaded, to, accept_license)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from ...core.io import read_json
    from ...runner.early_stopping import stopping_note
    from ...runner.model_loading import LoadPolicy, load_policy
    from ...runner.run import run_recipe
    from ..progress import RichProgress

    disable_library_progress_bars()
    with RichProgress(out) as progress, load_policy(LoadPolicy(trust_remote_code, allow_pickles)):
        result = run_recipe(loaded, resume=resume, callbacks=[progress], on_stage=progress.stage)
    evidence = read_json(result.folder / "results.json")
    out.print(results_table(result.models, evidence.get("chain")))
    if note := stopping_note(evidence.get("steps", {})):
        out.print(note, soft_wrap=True, highlight=False)
    out.print(f"Run folder: {result.folder} (the student: {result.folder / 'student'})", soft_wrap=True)
    if to and not out.quiet:
        from ...runner.run_results import open_run

        publish_run(open_run(result.folder), to, bool(loaded.train.hub_private_repo), (), None, accept_license)


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="How many GPUs there are.")] = 1,
    gpu_memory: Annotated[float, typer.Option(help="Memory of each, in GiB.")] = 80.0,
    mfu: Annotated[float, typer.Option(help="Share of the peak that training reaches.")] = 0.4,
    gpu_tflops: Annotated[float, typer.Option(help="Peak of a GPU in TFLOP/s; 989: H100, bf16, dense.")] = 989.0,
    pretraining_tokens: Annotated[float, typer.Option(help="Compare with training the student on these.")] = 2e12,
    smoke: Smoke = False,
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan, in bytes and FLOP.")] = False,
) -> None:
    """Memory, operations and hours of a recipe, before they are paid for; no weights are downloaded."""
    from ...recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], smoke=smoke)
    from ...planning.planner import plan as plan_recipe
    from ...recipe.load import recipes_by_stage

    numbers = (gpus, gpu_memory, mfu, gpu_tflops, pretraining_tokens)
    found = {name: plan_recipe(part, *numbers) for name, part in recipes_by_stage(loaded).items()}
    if as_json:
        plans: Any = {name: asdict(one) for name, one in found.items()}
        sys.stdout.write(json.dumps(plans if loaded.stages else plans[""], indent=2) + "\n")
        return
    for name, one in found.items():
        if name:
            out.rule(name)
        _print_plan(one)


def _print_plan(found: Any) -> None:
    from ...planning.render import caches_table, flops_table, legend, plan_table, verdict

    wide = out.width >= 120
    out.print(plan_table(found, wide))
    out.print(*legend(found, wide), sep="\n", highlight=False)
    out.print(flops_table(found))
    out.print(*caches_table(found), sep="\n", highlight=False)
    out.print(*verdict(found), sep="\n", highlight=False)


def results_table(models: dict[str, dict[str, float]], chain: list[dict[str, Any]] | None = None) -> Table:
    """Teacher, student before and after, and control, side by side; of a chain the students of all its stages.

    Args:
        models: name -> held-out metrics.
        chain: of the evidence of a chain.
    """
    table = Table(title="Held-out text")
    for heading in ("", "perplexity", "KL to teacher (nats/token)", "top-1 agreement"):
        table.add_column(heading, justify="right" if heading else "left")
    names = {"before": "student before", "student": "student after", "control": "control, hard labels alone"}
    if chain:
        names = {part["stage"]: f"{part['stage']}, {part['student']['blocks']} blocks" for part in chain}
        last = [part["stage"] for part in chain if part["stage"] != "direct"][-1]
        names = {{last: "student", "direct": "control"}.get(stage, stage): title for stage, title in names.items()}
    if "teacher_perplexity" in models["student"]:
        table.add_row("teacher", f"{models['student']['teacher_perplexity']:.2f}", "0", "1")
    for key, name in names.items():
        m = models.get(key, {})
        if "perplexity" in m:  # with alpha 0 nothing is measured before
            compared = (f"{m['kl']:.4f}", f"{m['agreement']:.3f}") if "kl" in m else ("-", "-")
            table.add_row(name, f"{m['perplexity']:.2f}", *compared)
    return table
