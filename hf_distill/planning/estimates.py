"""Strategies side by side, each with its memory, and which to choose."""

import logging
from bisect import bisect_left
from dataclasses import dataclass

from .memory import MemoryBreakdown, memory
from .strategy import Strategy, alternatives
from .workload import Workload

GiB = 2**30
_MOST = 4096  # GPUs


@dataclass(frozen=True)
class StrategyEstimate:
    """A strategy on the GPUs asked for; memory in bytes.

    own:           whether it is the recipe's
    fits:          whether `total` is within what may be used
    overrides:     what makes it the recipe's own: `hf-distill run RECIPE KEY=VALUE...`
    min_gpus:      the least number of GPUs at which it fits; None: at none
    deepspeed_gib: what DeepSpeed's estimator says of the student's weights, gradients and optimizer, in GiB; None
                   for what it does not know, or without DeepSpeed
    """

    strategy: Strategy
    own: bool
    parts: MemoryBreakdown
    total: int
    fits: bool
    overrides: list[str]
    min_gpus: int | None
    deepspeed_gib: float | None


def estimate_strategies(job: Workload, own: Strategy, gpus: int, usable: int) -> list[StrategyEstimate]:
    """The recipe's own strategy and the alternatives, the preferred first.

    Args:
        job: the models and the batch.
        own: the recipe's.
        gpus: how many there are.
        usable: bytes of each.
    """
    others = [strategy for strategy in alternatives(job.method, gpus, job.teacher_absent_because) if strategy != own]
    rows = []
    for strategy in [own, *others]:
        parts = memory(job, strategy, gpus, usable)
        changes = [change for change in strategy.overrides if change not in own.overrides]
        if job.checkpointing and own.student == "fsdp2" != strategy.student:
            changes.append("train.activation_checkpointing=true")  # the recipe's may be a part of its fsdp_config
        rows.append(
            StrategyEstimate(
                strategy=strategy,
                own=strategy == own,
                parts=parts,
                total=parts.total,
                fits=parts.total <= usable,
                overrides=changes,
                min_gpus=min_gpus(job, strategy, usable),
                deepspeed_gib=deepspeed_estimate(job, strategy, gpus),
            )
        )
    return sorted(rows, key=lambda row: row.strategy.order)


def min_gpus(job: Workload, strategy: Strategy, usable: int) -> int | None:
    """The least number of GPUs at which a strategy fits; None if it fits at none."""
    fewest = 2 if strategy.sharded and not strategy.offloads else 1
    counts = range(fewest, (_MOST if strategy.splits else fewest) + 1)
    i = bisect_left(counts, True, key=lambda n: memory(job, strategy.for_gpus(n), n, usable).total <= usable)
    return counts[i] if i < len(counts) else None


def fewest_gpus(job: Workload, usable: int) -> tuple[int, Strategy] | None:
    """The least number of GPUs that would do, and how; None where no number of them would."""
    strategies = sorted(alternatives(job.method, 2, job.teacher_absent_because), key=lambda strategy: strategy.order)
    found = [(least, strategy) for strategy in strategies if (least := min_gpus(job, strategy, usable))]
    return min(found, key=lambda pair: pair[0], default=None)


def deepspeed_estimate(job: Workload, strategy: Strategy, gpus: int) -> float | None:
    """GiB of a GPU for the student's weights, gradients and optimizer, as DeepSpeed's own estimators say.

    They count 18 bytes a parameter (20 under ZeRO-2), where `memory` counts 16: they hold gradients in fp32 beside
    those in bf16 (ZeRO-2: of a whole process's share), which a step makes and lets go. Of what is gathered they count
    the largest layer in fp32. They know no adapters, activations or reduce buckets. None without DeepSpeed, and for
    other strategies.
    """
    if strategy.student not in ("zero2", "zero3") or job.lora:
        return None
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # importing DeepSpeed writes to stdout which accelerator it found
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except ImportError:
        return None
    finally:
        logging.disable(disabled)
    student, offload = job.student, strategy.offload_optimizer
    if strategy.student == "zero2":
        return zero2(student.parameters, gpus, cpu_offload=offload)[1] / GiB
    layer = max(student.block, student.head)
    return zero3(student.parameters, layer, gpus, 1, offload, offload and strategy.offload_student)[1] / GiB


def advice(
    rows: list[StrategyEstimate],
    cheapest: StrategyEstimate | None,
    best: StrategyEstimate | None,
    gpus: int,
    least: tuple[int, Strategy] | None,
) -> str:
    """What to do, in words.

    Args:
        rows: the strategies.
        cheapest: the row with the fewest GPUs.
        best: the row preferred on all of them.
        gpus: how many there are.
        least: what `fewest_gpus` found.
    """
    own = next(row for row in rows if row.own)
    said = f"The recipe's own, {own.strategy.name}, {'fits' if own.fits else 'does not fit'} {_count(gpus)}"
    if not own.fits and own.min_gpus:
        said += f" (it takes {own.min_gpus})"
    if cheapest is None and least:
        return f"{said}. Nothing here does: {least[1].name} takes the fewest, {_count(least[0])} of this size."
    if cheapest is None:
        return (
            f"{said}, nor does anything here fit any number of them: lower train.per_device_train_batch_size or "
            "data.max_length, set train.activation_checkpointing=true, train adapters (student.lora), or offload "
            "(train.deepspeed=zero3-student-offload.json)."
        )
    if cheapest.min_gpus == gpus:
        said += "." if cheapest.own else f". What does: {cheapest.strategy.name}."
    elif cheapest.own:
        said += f"; {cheapest.min_gpus} would do, in as many GPU-hours for as many tokens."
    else:
        said += (
            f". Fewest GPUs: {cheapest.strategy.name} on {cheapest.min_gpus}, in as many GPU-hours for as many tokens."
        )
    if best is not None and best is not cheapest and not best.own:
        said += f" Preferred on all {gpus}: {best.strategy.name}."
    return said


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"
