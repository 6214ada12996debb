"""A plan as a terminal shows it."""

from rich.table import Table

from .planner import Plan
from .rows import GiB, Row

# Part -> heading
_PARTS = {
    "teacher": "teacher",
    "student": "student",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "head": "head",
    "features": "feat",
    "gathered": "gather",
    "host": "host",
}


def plan_table(plan: Plan, wide: bool) -> Table:
    """Memory of one GPU: a strategy a row, a part a column, in GiB; parts that nobody needs are left out.

    Args:
        plan: what to show.
        wide: whether there is room for DeepSpeed's own estimates.
    """
    parts = [name for name in _PARTS if any(getattr(row.parts, name) for row in plan.rows)]
    title = f"GiB on each of {plan.gpus} GPU{'s' if plan.gpus > 1 else ''} ({plan.usable / GiB:.1f} may be used)"
    table = Table(title=title, box=None, pad_edge=False, collapse_padding=True)
    table.add_column("teacher + student", no_wrap=True)
    for name in parts:
        table.add_column(_PARTS[name], justify="right", no_wrap=True)
    for heading in ("total", "fits", "least"):
        table.add_column(heading, justify="right", no_wrap=True)
    wide = wide and any(row.deepspeed_gib is not None for row in plan.rows)
    if wide:
        table.add_column("DeepSpeed says", justify="right")
    for row in plan.rows:
        mark = (">" if row.own else "") + ("*" if row is plan.cheapest else "")
        cells = [f"{mark:2} {row.strategy.name}", *(_gib(getattr(row.parts, name)) for name in parts), _gib(row.total)]
        cells += ["yes" if row.fits else "no", str(row.min_gpus or "never")]
        if wide:
            cells.append("" if row.deepspeed_gib is None else f"{row.deepspeed_gib:.1f}")
        table.add_row(*cells, style=_style(row, plan))
    return table


def plan_lines(plan: Plan) -> list[str]:
    """What the table leaves open: its legend, operations, time, advice."""
    cost, teacher, student = plan.cost, plan.teacher, plan.student
    lines = [
        "> the recipe's own; * the cheapest that fits; least: GPUs of this size at which it fits. Kept free: 1 GiB for "
        "the CUDA context and 5 %. Activations are an estimate; head takes an eighth of what is left.",
        "",
    ]
    for role, model in (("Teacher", teacher), ("Student", student)):
        trained = "" if model.trained in (0, model.parameters) else f", {_size(model.trained)} of them in adapters"
        lines.append(f"{role}: {model.name}, {_size(model.parameters)} parameters{trained}")
        counted = "not counted" if model.counted is None else _tera(model.counted * plan.length)
        lines.append(
            f"  forward of {plan.length} tokens, TFLOP: {_tera(model.forward * plan.length)} by formula, {counted} by "
            f"torch's counter, {_tera(2 * model.parameters * plan.length)} by the rule 2N"
        )
    lines.append(
        f"  training on them, TFLOP: {_tera(student.training * plan.length)} by formula, "
        f"{_tera(6 * student.parameters * plan.length)} by the rule 6N"
    )
    lines += ["", *_cost_lines(plan), "", plan.advice]
    if plan.cheapest is not None and not plan.cheapest.own:
        lines.append(f"To run {plan.cheapest.strategy.name}, add: {' '.join(plan.cheapest.strategy.overrides)}")
    return lines


def _cost_lines(plan: Plan) -> list[str]:
    cost = plan.cost
    speed = (
        f"{cost.tokens_per_second:,.0f} tokens/s on {plan.gpus} GPUs at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s"
    )
    if cost.tokens is None:
        return [
            f"Run: epochs of data whose length is unknown, {cost.tokens_per_step:,} tokens a step; give "
            "train.max_steps=N for its cost.",
            speed,
        ]
    return [
        f"Run: {cost.tokens:.3g} tokens ({cost.tokens_per_step:,} a step): {cost.flop:.3g} FLOP by formula, "
        f"{cost.rule:.3g} by the rule 2N + 6N",
        f"{speed}: {cost.gpu_hours:,.0f} GPU-hours, {cost.gpu_hours / plan.gpus:,.1f} hours",
        f"{cost.share:.2%} of training the student alone on {plan.pretraining_tokens:.3g} tokens "
        f"({plan.pretraining:.3g} FLOP by the rule 6N)",
    ]


def _style(row: Row, plan: Plan) -> str:
    return "bold" if row.own or row is plan.cheapest else "" if row.fits else "dim"


def _gib(count: int) -> str:
    return "-" if count == 0 else f"{count / GiB:.1f}"


def _tera(flop: float) -> str:
    return f"{flop / 1e12:,.3g}" if flop < 1e15 else f"{flop / 1e12:,.0f}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
