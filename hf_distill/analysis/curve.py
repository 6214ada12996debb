"""What a run's tokens brought, and what they cost beside pretraining."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import Any

from ..errors import DistillError
from ..planning.flops import rule_of_thumb
from ..planning.planner import plan
from ..recipe.schema import Recipe
from ..runner.run_results import Run


@dataclass(frozen=True)
class Point:
    """One evaluation of a run.

    tokens: that the student had been trained on
    nll:    of the labels of the held-out rows, nats/token
    kl:     KL(teacher || student) at T = 1; None where nothing was distilled
    share:  of the run's whole fall of nll that was reached: 0 at its start, 1 at its end
    """

    step: int
    tokens: int
    nll: float
    kl: float | None
    agreement: float | None
    share: float


@dataclass(frozen=True)
class Compute:
    """What a run computed, in FLOP, beside pretraining its student.

    tokens:      that it trained on
    teacher:     its forward; 0 where it stands on disk
    student:     forward and backward
    rule:        both by the rule of thumb, 2 N and 6 N a token
    pretraining: of the student on `pretraining_tokens`, by the rule
    share:       of both in it
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
    """A student's quality over its tokens, from one run's evaluations.

    points:  in order
    reached: share of the fall -> tokens after which it was there, on straight lines between points; of 4 or more
    hint:    how to get more points, where there are few
    compute: see `Compute`
    """

    points: list[Point]
    reached: dict[float, int]
    hint: str | None
    compute: Compute


def data_curve(run: Run, pretraining_tokens: float = 2e12, shares: Sequence[float] = (0.5, 0.9, 0.95)) -> Curve:
    """A run's quality over its tokens, and its operations.

    Args:
        run: see `open_run`.
        pretraining_tokens: on which the student might have been trained instead.
        shares: for `reached`.

    Raises:
        DistillError: the run has fewer than two evaluations, or is a chain's, whose stages are runs of their own.
    """
    if run.recipe.stages:
        raise DistillError(f"{run.folder} is a chain: give one of its stages, such as {run.folder / 'stage-1'}.")
    evaluations = {line["step"]: line for line in run.logs() if "eval_perplexity" in line}
    if len(evaluations) < 2:
        raise DistillError(
            f"{run.folder / 'metrics.jsonl'} has {len(evaluations)} evaluations of a language model, and a curve needs "
            "two: `hf-distill run RECIPE train.eval_strategy=steps train.eval_steps=N` writes more."
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
            f"{len(points)} evaluations are two ends and little between: set train.eval_strategy=steps and "
            "train.eval_steps in the recipe for a curve."
        )
    tokens = trained_tokens(run, max(nll))
    return Curve(
        points, {} if hint else _reached(points, shares), hint, compute(run.recipe, tokens, pretraining_tokens)
    )


def compute(recipe: Recipe, tokens: int, pretraining_tokens: float = 2e12) -> Compute:
    """What a recipe computes over so many tokens, beside pretraining its student."""
    sharded = recipe.train.fsdp or recipe.train.deepspeed or (recipe.teacher and recipe.teacher.fsdp)
    found = plan(recipe, 8 if sharded else 1, 80.0, pretraining_tokens=pretraining_tokens)
    student = found.student.training * tokens
    teacher = found.cost.flop_per_token * tokens - student
    rule = rule_of_thumb(found.teacher.parameters if teacher else 0, found.student.parameters, tokens).total
    share = (teacher + student) / found.pretraining
    return Compute(tokens, teacher, student, rule, pretraining_tokens, found.pretraining, share)


def trained_tokens(run: Run, steps: int) -> int:
    """Tokens that a run's student had been trained on after so many steps."""
    return round(steps * _tokens_per_step(run))


def _tokens_per_step(run: Run) -> float:
    """Tokens of a global batch: rows times their mean length, as the run's evidence has it."""
    train, facts = run.recipe.train, run.results
    rows = (train.per_device_train_batch_size or 8) * (train.gradient_accumulation_steps or 1)
    processes: Any = facts.get("environment", {}).get("processes", 1)
    return rows * processes * facts.get("data", {}).get("tokens_per_row", run.recipe.data.max_length)


def _reached(points: Sequence[Point], shares: Sequence[float]) -> dict[float, int]:
    found = {}
    for share in shares:
        for before, after in pairwise(points):
            if after.share >= share:
                part = (share - before.share) / (after.share - before.share)
                found[share] = round(before.tokens + part * (after.tokens - before.tokens))
                break
    return found
