"""A plan as a terminal shows it."""

from rich.table import Table

from .estimates import GiB, StrategyEstimate
from .planner import Plan

_MIB = 2**20
# Part -> heading for 80 columns: at most as wide as a number.
_PARTS = {
    "teacher": "teach",
    "student": "stud",
    "gradients": "grads",
    "optimizer": "optim",
    "activations": "activ",
    "head": "head",
    "features": "feat",
    "gathered": "extra",
}


def plan_table(plan: Plan, wide: bool) -> Table:
    """Memory of one GPU: a strategy a row, a part a column; parts that nobody needs are left out.

    Args:
        plan: what to show.
        wide: whether there is room for whole words and DeepSpeed's own estimates.
    """
    parts = [name for name in _PARTS if any(getattr(row.parts, name) for row in plan.rows)]
    unit, name = (GiB, "GiB") if max(row.total for row in plan.rows) > GiB else (_MIB, "MiB")
    title = f"{name} on each of {plan.gpus} GPU{'s' if plan.gpus > 1 else ''} ({plan.usable / GiB:.1f} GiB may be used)"
    table = Table(title=title, box=None, pad_edge=False, collapse_padding=True)
    table.add_column("  teacher+student", no_wrap=True)
    for part in parts:
        table.add_column(part if wide else _PARTS[part], justify="right", no_wrap=True)
    for heading in ("total", "fits", "GPUs"):
        table.add_column(heading, justify="right", no_wrap=True)
    estimated = wide and any(row.deepspeed_gib is not None for row in plan.rows)
    if estimated:
        table.add_column("DeepSpeed's", justify="right", no_wrap=True)
    for row in plan.rows:
        mark = (">" if row.own else "") + ("*" if row is plan.cheapest else "")
        cells = [_amount(getattr(row.parts, part), unit) for part in parts] + [_amount(row.total, unit)]
        cells += ["yes" if row.fits else "no", str(row.min_gpus or "-")]
        if estimated:
            cells.append("" if row.deepspeed_gib is None else _amount(int(row.deepspeed_gib * GiB), unit))
        table.add_row(f"{mark:2}{row.strategy.name}", *cells, style=_style(row, plan))
    return table


def flops_table(plan: Plan) -> Table:
    """Operations for a token and for a sequence: by formula, as torch counts them, by the rule of thumb."""
    table = Table(title=f"Operations: GFLOP a token, TFLOP for {plan.length} tokens", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("a token", "by formula", "torch's counter", "rule 2N, 6N"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [
        ("teacher, forward", plan.teacher.forward, plan.teacher.counted, 2 * plan.teacher.parameters),
        ("student, forward", plan.student.forward, plan.student.counted, 2 * plan.student.parameters),
        ("student, training", plan.student.training, None, 6 * plan.student.parameters),
    ]
    for name, formula, counted, rule in rows:
        sequences = ["" if flop is None else _number(flop * plan.length / 1e12) for flop in (formula, counted, rule)]
        table.add_row(name, _number(formula / 1e9), *sequences)
    return table


def caches_table(plan: Plan) -> list[Table | str]:
    """What a cache of the teacher would take, and when it pays; nothing where there can be none."""
    if plan.caches is None:
        return []
    table = Table(title="The teacher on disk (hf-distill cache write)", box=None, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("bytes a token", justify="right", no_wrap=True)
    table.add_column("of the run's tokens" if plan.caches.tokens else "of 1e9 tokens", justify="right", no_wrap=True)
    table.add_column("tells")
    tokens = plan.caches.tokens or 10**9
    for kind in plan.caches.kinds:
        size = (kind.bytes_per_token * tokens + kind.head) / GiB
        table.add_row(kind.kind, _number(kind.bytes_per_token), f"{_number(size)} GiB", kind.supports)
    pays = (
        f"It saves {plan.caches.saved:.0%} of a step's operations, and pays from the second pass over the data on: an "
        "epoch, another student, another run."
    )
    heads = [
        f"The output head takes {kind.head / _MIB:.0f} MiB of {kind.kind}." for kind in plan.caches.kinds if kind.head
    ]
    return [table, *heads, pays]


def legend(plan: Plan, wide: bool) -> list[str]:
    """What the memory table takes for granted, and the two models."""
    activations, gathered = [name if wide else _PARTS[name] for name in ("activations", "gathered")]
    lines = [
        "> the recipe's own  * fewest GPUs  GPUs: the least of this size at which it fits",
        f"{gathered}: shares made whole, buckets, casts. {activations}: an estimate. head: an eighth of what is left.",
        "Kept free: 1 GiB for the CUDA context, and 5 % for fragmentation.",
    ]
    if wide and any(row.deepspeed_gib is not None for row in plan.rows):
        lines.append("DeepSpeed's: its own estimate of student, gradients and optimizer.")
    hosted = [row for row in plan.rows if row.parts.host]
    lines += [
        f"^ offloaded: {_amount(row.parts.host, GiB)} GiB of host memory a process, "
        f"{_amount(row.parts.host * row.strategy.processes(plan.gpus), GiB)} in all"
        for row in hosted
    ]
    lines.append("")
    for role, model in (("Teacher", plan.teacher), ("Student", plan.student)):
        trained = "" if model.trained in (0, model.parameters) else f", {_size(model.trained)} more in adapters"
        lines.append(f"{role}: {model.name}, {_size(model.parameters)} parameters{trained}")
    return [*lines, ""]


def verdict(plan: Plan) -> list[str]:
    """Operations, hours and share of the run, and what to do."""
    cost, speed = plan.cost, plan.cost.tokens_per_second
    pace = f"{speed:,.0f} tokens/s on {plan.gpus} x {plan.peak_tflops:g} TFLOP/s at {plan.mfu:.0%} of peak"
    if cost.tokens is None or cost.gpu_hours is None or cost.share is None:
        step = f"{cost.tokens_per_step:,} tokens a step"
        lines = [
            f"Run: epochs of data whose length is unknown, {step}; its cost: give train.max_steps=N."
            + (" The control trains the student as long again, without the teacher." if cost.control is None else ""),
            f"Time: {pace}",
        ]
    else:
        lines = [
            f"Run: {cost.tokens:.3g} tokens, {cost.tokens_per_step:,} a step: {cost.flop:.3g} FLOP by formula, "
            f"{cost.rule:.3g} by the rule",
            f"Time: {pace}: {_number(cost.gpu_hours)} GPU-hours, {_number(cost.gpu_hours / plan.gpus)} hours",
            *(
                [f"Control: {cost.control:.3g} FLOP of these train the student on hard labels alone"]
                if cost.control
                else []
            ),
            f"Share: {_number(100 * cost.share)} % of training the student alone on {plan.pretraining_tokens:.0e} "
            f"tokens, {plan.pretraining:.3g} FLOP by the rule",
        ]
    lines = ["", *lines, "", plan.advice]
    for row in {id(row): row for row in (plan.cheapest, plan.best) if row and not row.own}.values():
        lines.append(f"{row.strategy.name}: {' '.join(row.overrides)}")
    return lines


def _style(row: StrategyEstimate, plan: Plan) -> str:
    return "bold" if row.own or row is plan.cheapest else "" if row.fits else "dim"


def _amount(count: int, unit: int) -> str:
    value = count / unit
    return "-" if count == 0 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"
