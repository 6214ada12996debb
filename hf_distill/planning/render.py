"""Tables and sentences that show a plan in a terminal."""

from rich.table import Table

from .estimates import GiB, StrategyEstimate
from .planner import Plan

_MIB = 2**20
# Part -> heading for 80 columns, at most as wide as a number.
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
    """Build the table of one GPU's memory: a row per strategy and a column per part that any strategy needs.

    Args:
        plan: the plan.
        wide: whether there is room for full headings and for DeepSpeed's own estimates.
    """
    parts = [name for name in _PARTS if any(getattr(row.parts, name) for row in plan.rows)]
    unit, name = (GiB, "GiB") if max(row.total for row in plan.rows) > GiB else (_MIB, "MiB")
    gpus = f"each of {plan.gpus} GPUs" if plan.gpus > 1 else "1 GPU"
    title = f"Memory in {name} on {gpus} ({plan.usable / GiB:.1f} GiB usable)"
    table = Table(title=title, box=None, pad_edge=False, collapse_padding=True)
    table.add_column("  teacher + student", no_wrap=True)
    for part in parts:
        table.add_column(part if wide else _PARTS[part], justify="right", no_wrap=True)
    for heading in ("total", "fits", "GPUs"):
        table.add_column(heading, justify="right", no_wrap=True)
    estimated = wide and any(row.deepspeed_gib is not None for row in plan.rows)
    if estimated:
        table.add_column("DeepSpeed", justify="right", no_wrap=True)
    for row in plan.rows:
        mark = (">" if row.is_recipe_strategy else "") + ("*" if row is plan.cheapest else "")
        cells = [_amount(getattr(row.parts, part), unit) for part in parts] + [_amount(row.total, unit)]
        cells += ["yes" if row.fits else "no", str(row.min_gpus or "-")]
        if estimated:
            cells.append("" if row.deepspeed_gib is None else _amount(int(row.deepspeed_gib * GiB), unit))
        table.add_row(f"{mark:2}{row.strategy.name}", *cells, style=_style(row, plan))
    return table


def flops_table(plan: Plan) -> Table:
    """Build the table of FLOP per token and per sequence: by formula, counted by torch, and by the rule of thumb."""
    table = Table(title=f"GFLOP per token, and TFLOP per sequence of {plan.length} tokens", box=None, pad_edge=False)
    table.add_column("", no_wrap=True)
    for heading in ("per token", "by formula", "torch's counter", "rule 2N, 6N"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [
        ("teacher, forward", plan.teacher.forward, plan.teacher.counted, 2 * plan.teacher.parameters),
        ("student, forward", plan.student.forward, plan.student.counted, 2 * plan.student.parameters),
        ("student, training", plan.student.training, None, 6 * plan.student.parameters),
    ]
    for name, formula, counted, rule in rows:
        sequences = [
            "" if flop is None else number_text(flop * plan.length / 1e12) for flop in (formula, counted, rule)
        ]
        table.add_row(name, number_text(formula / 1e9), *sequences)
    return table


def caches_table(plan: Plan) -> list[Table | str]:
    """Build the table of teacher caches, and say when a cache pays off; empty where the teacher cannot be cached."""
    if plan.caches is None:
        return []
    table = Table(title="Size of a teacher cache (hf-distill cache write --kind KIND)", box=None, pad_edge=False)
    table.add_column("kind", no_wrap=True)
    table.add_column("bytes per token", justify="right", no_wrap=True)
    table.add_column("size for the run" if plan.caches.tokens else "size for 1e9 tokens", justify="right", no_wrap=True)
    table.add_column("supports")
    tokens = plan.caches.tokens or 10**9
    for kind in plan.caches.kinds:
        size = (kind.bytes_per_token * tokens + kind.head) / GiB
        table.add_row(kind.kind, number_text(kind.bytes_per_token), f"{number_text(size)} GiB", kind.supports)
    pays = (
        f"A cache saves {plan.caches.saved:.0%} of a step's FLOP. It pays off from the second pass over the data: a "
        "second epoch, another student or another run."
    )
    heads = [
        f"The size of {kind.kind} includes {kind.head / _MIB:.0f} MiB for the output head."
        for kind in plan.caches.kinds
        if kind.head
    ]
    return [table, *heads, pays]


def legend(plan: Plan, wide: bool) -> list[str]:
    """Explain the memory table and name the two models."""
    activations, gathered = [name if wide else _PARTS[name] for name in ("activations", "gathered")]
    lines = [
        "> the recipe's strategy  * the strategy that fits on the fewest GPUs",
        "GPUs: the smallest number of GPUs of this size on which the strategy fits.",
        *_strategy_legend(plan),
        f"{activations}: activations, an estimate. {gathered}: gathered shards, buckets and casts."
        if any(row.parts.gathered for row in plan.rows)
        else f"{activations}: activations, an estimate.",
        "head: gradients and one chunk of logits of the fused loss, about 1 GiB, with its temporaries.",
        "Usable memory leaves 1 GiB for the CUDA context and 5 % for fragmentation.",
    ]
    if wide and any(row.deepspeed_gib is not None for row in plan.rows):
        lines.append("DeepSpeed: its own estimate of the student's weights, gradients and optimizer states.")
    lines += [
        f"^ {row.strategy.name} offloads {_amount(row.parts.host, GiB)} GiB per process to host memory, "
        f"{_amount(row.parts.host * row.strategy.processes(plan.gpus), GiB)} GiB in total."
        for row in plan.rows
        if row.parts.host
    ]
    lines.append("")
    for role, model in (("Teacher", plan.teacher), ("Student", plan.student)):
        adapters = "" if model.trained in (0, model.parameters) else f", and {_size(model.trained)} in adapters"
        lines.append(f"{role}: {model.name}, {_size(model.parameters)} parameters{adapters}")
    return [*lines, ""]


_PLACEMENTS = {
    "self": "self: the teacher is the student in another state.",
    "cache": "cache: the teacher is read from a teacher cache.",
    "remote": "remote: the teacher runs on a server; with api: hidden its output head is on the GPU.",
    "full": "full: every process has an unquantized copy of the teacher.",
    "single": "single: the student trains in one process.",
}


def _strategy_legend(plan: Plan) -> list[str]:
    """Explain the names of strategies that are not names of libraries."""
    names = {name for row in plan.rows for name in (row.strategy.teacher, row.strategy.student)}
    return [text for name, text in _PLACEMENTS.items() if name in names]


def verdict(plan: Plan) -> list[str]:
    """Say what the run costs, compare it with pretraining the student, and recommend a strategy."""
    cost, speed = plan.cost, plan.cost.tokens_per_second
    gpus = "1 GPU" if plan.gpus == 1 else f"each of {plan.gpus} GPUs"
    pace = f"{speed:,.0f} tokens/s at {plan.mfu:.0%} of {plan.peak_tflops:g} TFLOP/s on {gpus}"
    if cost.tokens is None or cost.gpu_hours is None or cost.share is None:
        lines = [
            f"Run: {cost.tokens_per_step:,} tokens per step. The recipe counts epochs and the length of its data is "
            "unknown, so its cost is unknown too: set train.max_steps=N to see it."
            + (" The control trains for as long." if cost.control is None else ""),
            f"Time: {pace}",
        ]
    else:
        lines = [
            f"Run: {cost.tokens:.3g} tokens, {cost.tokens_per_step:,} per step; {cost.flop:.3g} FLOP by formula, "
            f"{cost.rule:.3g} by the rule of thumb",
            f"Time: {pace}: {number_text(cost.gpu_hours)} GPU-hours, {number_text(cost.gpu_hours / plan.gpus)} hours",
            *([f"Control: {cost.control:.3g} of these FLOP train the control"] if cost.control else []),
            f"Share: {number_text(100 * cost.share)} % of pretraining the student on {plan.pretraining_tokens:.0e} "
            f"tokens, which takes {plan.pretraining:.3g} FLOP by the rule of thumb",
        ]
    lines = ["", *lines, *_decoding(plan), "", plan.advice]
    for row in {id(row): row for row in (plan.cheapest, plan.best) if row and not row.is_recipe_strategy}.values():
        lines.append(f"To use {row.strategy.name}, add: {' '.join(row.overrides)}")
    return lines


def _decoding(plan: Plan) -> list[str]:
    """Compare the speed at which both models generate one sequence; nothing where they are the same model."""
    teacher, student = plan.decoding
    if teacher == student:
        return []
    return [
        f"Decoding: each token reads {bytes_text(student.weights)} of weights and {bytes_text(student.kv_cache)} of KV "
        f"cache per token of context in bf16 (teacher: {bytes_text(teacher.weights)} and "
        f"{bytes_text(teacher.kv_cache)}). Where this is the limit, as with one sequence of {plan.length} tokens, the "
        "student generates "
        f"{number_text(student.speed_up(teacher, plan.length))} times as many tokens/s"
    ]


def bytes_text(count: int) -> str:
    """Return a number of bytes with a unit."""
    return f"{count / 1e9:.3g} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB" if count >= 1e6 else f"{count:,} bytes"


def _style(row: StrategyEstimate, plan: Plan) -> str:
    return "bold" if row.is_recipe_strategy or row is plan.cheapest else "" if row.fits else "dim"


def _amount(count: int, unit: int) -> str:
    value = count / unit
    return "-" if count == 0 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def number_text(value: float) -> str:
    """Return a number with three digits, or as a whole number from 1,000."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _size(count: int) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count:,}"
