"""Strategies side by side, each with its memory, and which to choose."""

import logging
from dataclasses import dataclass

from .job import Job
from .memory import Parts, memory
from .strategy import Strategy, alternatives

GiB = 2**30
_MOST = 4096  # GPUs


@dataclass(frozen=True)
class Row:
    """A strategy on the GPUs asked for; memory in bytes.

    own:           whether it is the recipe's
    fits:          whether `total` is within what may be used
    min_gpus:      the least number of GPUs at which it fits; None: at none
    deepspeed_gib: what DeepSpeed's estimator says of the student's weights, gradients and optimizer, in GiB; None
                   for what it does not know, or without DeepSpeed
    """

    strategy: Strategy
    own: bool
    parts: Parts
    total: int
    fits: bool
    min_gpus: int | None
    deepspeed_gib: float | None


def rows_of(job: Job, own: Strategy, gpus: int, usable: int) -> list[Row]:
    """The recipe's own strategy and the alternatives, the preferred first.

    Args:
        job: the models and the batch.
        own: the recipe's.
        gpus: how many there are.
        usable: bytes of each.
    """
    others = [strategy for strategy in alternatives(job.method, gpus) if strategy != own]
    rows = []
    for strategy in [own, *others]:
        parts = memory(job, strategy, gpus, usable)
        estimate = deepspeed_estimate(job, strategy, gpus)
        least = min_gpus(job, strategy, usable)
        rows.append(Row(strategy, strategy == own, parts, parts.total, parts.total <= usable, least, estimate))
    return sorted(rows, key=lambda row: row.strategy.order)


def min_gpus(job: Job, strategy: Strategy, usable: int) -> int | None:
    """The least number of GPUs at which a strategy fits; None if it fits at none."""
    count = 2 if strategy.sharded and not strategy.offloads else 1
    while count <= _MOST:
        if memory(job, strategy.on(count), count, usable).total <= usable:
            return count
        if not strategy.splits:
            return None
        count += 1 if count < 64 else 8
    return None


def deepspeed_estimate(job: Job, strategy: Strategy, gpus: int) -> float | None:
    """GiB of a GPU for the student's weights, gradients and optimizer, as DeepSpeed's own estimators say.

    They count 18 bytes a parameter (20 under ZeRO-2) and the largest layer in fp32 (ZeRO-3), where `memory` counts 16:
    they hold gradients in fp32 beside those in bf16, for an optimizer step that makes them and lets them go. They know no
    adapters, activations or reduce buckets. None without DeepSpeed, and for other strategies.
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


def advice(rows: list[Row], cheapest: Row | None, best: Row | None, gpus: int, gpu_memory: float) -> str:
    """What to do, in words."""
    own = next(row for row in rows if row.own)
    said = f"The recipe's own ({own.strategy.name}) "
    said += "fits." if own.fits else f"does not fit {gpus} of {gpu_memory:g} GiB"
    if not own.fits:
        said += f"; it takes {own.min_gpus} GPUs." if own.min_gpus else ", nor any number of them."
    if cheapest is not None:
        said += f" Cheapest that fits: {cheapest.strategy.name} on {cheapest.min_gpus}."
        if best is not None and best is not cheapest:
            said += f" On all {gpus}: {best.strategy.name}."
        return said
    later = [row for row in rows if row.min_gpus]
    if later:
        row = min(later, key=lambda row: (row.min_gpus, row.strategy.order))
        return f"{said} Nothing fits {gpus}: {row.strategy.name} takes the fewest, {row.min_gpus} GPUs of this size."
    return (
        f"{said} Nothing fits GPUs of this size: lower train.per_device_train_batch_size or data.max_length, set "
        "train.gradient_checkpointing=true, train adapters (student.lora), or offload (zero3-student-offload.json)."
    )
