"""Quality of a run's student over its training tokens, and the compute compared with pretraining."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log

from ..core import run_files
from ..core.defaults import PRETRAINING_TOKENS
from ..errors import DistillError
from ..planning.flops import rule_of_thumb
from ..planning.planner import plan
from ..recipe.schema import Recipe
from ..runner.run_results import Run


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    tokens: on which the student had been trained
    nll:    of the labels of the held-out rows, nats/token
    kl:     KL(teacher || student) at T = 1, nats/token; None without distillation
    agreement: top-1 agreement, in [0, 1]; None without distillation
    share:  of the run's total fall of the NLL: 0 at the start, 1 at the end
    """

    step: int
    tokens: int
    nll: float
    kl: float | None
    agreement: float | None
    share: float


@dataclass(frozen=True)
class Compute:
    """Compute of a run, in FLOP, compared with pretraining its student.

    tokens:      on which the student was trained
    teacher:     forward passes of the teacher; 0 with a teacher cache
    student:     forward and backward passes of the student
    rule:        both by the rule of thumb: 2 N and 6 N per token
    pretraining: of the student on `pretraining_tokens`, by the rule
    share:       (teacher + student) / pretraining
    """

    tokens: int
    teacher: float
    student: float
    rule: float
    pretraining_tokens: float
    pretraining: float
    share: float


@dataclass(frozen=True)
class Curve:
    """Quality over tokens, from the evaluations of one run.

    points:  in the order of the steps
    reached: share of the fall -> tokens after which it was reached, interpolated linearly; empty below 4 points
    hint:    how to get more points; None if there are enough
    compute: see `Compute`
    """

    points: list[Point]
    reached: dict[float, int]
    hint: str | None
    compute: Compute


def data_curve(
    run: Run, pretraining_tokens: float = PRETRAINING_TOKENS, shares: Sequence[float] = (0.5, 0.9, 0.95)
) -> Curve:
    """Return a run's quality over its tokens, and its compute.

    Args:
        run: see `open_run`.
        pretraining_tokens: number of tokens of the pretraining that the compute is compared with.
        shares: for `reached`.

    Raises:
        DistillError: the run has fewer than two evaluations, or has stages, which are separate runs.
    """
    if run.recipe.stages:
        raise DistillError(
            f"{run.folder} is a run with stages: give the folder of one of its stages, such as "
            f"{run.folder / 'stage-1'}."
        )
    evaluations = {int(line["step"]): line for line in run.logs() if "eval_perplexity" in line}
    if len(evaluations) < 2:
        raise DistillError(
            f"{run.folder / run_files.METRICS} has {len(evaluations)} evaluations of a language model, and a curve "
            "needs at least two: `hf-distill run RECIPE train.eval_strategy=steps train.eval_steps=N` writes more."
        )
    nll = {step: log(line["eval_perplexity"]) for step, line in sorted(evaluations.items())}
    first, last = nll[min(nll)], nll[max(nll)]
    fall = first - last
    points = [
        Point(
            step,
            trained_tokens(run, step),
            value,
            evaluations[step].get("eval_kl"),
            evaluations[step].get("eval_agreement"),
            (first - value) / fall if fall else 1.0,
        )
        for step, value in nll.items()
    ]
    hint = None
    if len(points) < 4:
        hint = (
            f"{len(points)} evaluations are too few for a curve: set train.eval_strategy=steps and train.eval_steps in "
            "the recipe to get at least 4."
        )
    tokens = trained_tokens(run, max(nll))
    reached = {} if hint else _tokens_at_shares(points, shares)
    return Curve(points, reached, hint, compute(run.recipe, tokens, pretraining_tokens))


def compute(recipe: Recipe, tokens: int, pretraining_tokens: float = PRETRAINING_TOKENS) -> Compute:
    """Return the compute of a recipe over `tokens` training tokens, compared with pretraining its student.

    Args:
        recipe: the recipe.
        tokens: number of training tokens.
        pretraining_tokens: number of tokens of the pretraining to compare with.

    Returns:
        FLOP of the run and of the pretraining.
    """
    is_sharded = recipe.train.fsdp or recipe.train.deepspeed or (recipe.teacher and recipe.teacher.fsdp)
    planned = plan(recipe, 8 if is_sharded else 1, 80.0, pretraining_tokens=pretraining_tokens)
    student = planned.student.training * tokens
    teacher = planned.cost.flop_per_token * tokens - student
    rule = rule_of_thumb(planned.teacher.parameters if teacher else 0, planned.student.parameters, tokens).total
    share = (teacher + student) / planned.pretraining
    return Compute(tokens, teacher, student, rule, pretraining_tokens, planned.pretraining, share)


def trained_tokens(run: Run, steps: int) -> int:
    """Return the number of tokens on which a run's student had been trained after `steps` optimizer steps."""
    return round(steps * _tokens_per_step(run))


def rows_per_step(run: Run) -> int:
    """Return the number of rows of a global batch, of all processes."""
    train = run.recipe.train
    processes = int(run.results.get("environment", {}).get("processes") or 1)
    return (train.per_device_train_batch_size or 8) * (train.gradient_accumulation_steps or 1) * processes


def _tokens_per_step(run: Run) -> float:
    """Return the tokens of a global batch: rows times their mean length, from results.json."""
    return rows_per_step(run) * run.results.get("data", {}).get("tokens_per_row", run.recipe.data.max_length)


def _tokens_at_shares(points: Sequence[Point], shares: Sequence[float]) -> dict[float, int]:
    """Interpolate after how many tokens each share of the fall was reached."""
    reached = {}
    for share in shares:
        for before, after in pairwise(points):
            if after.share >= share:
                fraction = (share - before.share) / (after.share - before.share)
                reached[share] = round(before.tokens + fraction * (after.tokens - before.tokens))
                break
    return reached
