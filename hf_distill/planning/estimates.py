"""Estimate the memory of every placement strategy, and recommend one."""

import logging
from bisect import bisect_left
from dataclasses import dataclass

from .memory import MemoryBreakdown, estimate_memory
from .strategy import Strategy, alternatives
from .workload import Workload

GiB = 2**30
_MAX_GPUS = 4096


@dataclass(frozen=True)
class StrategyEstimate:
    """The memory of a strategy on a number of GPUs, in bytes.

    strategy:           the placement of teacher and student
    is_recipe_strategy: whether the recipe uses this strategy
    parts:              bytes of each part of the memory
    total:              bytes on one GPU
    fits:               whether `total` is at most the usable memory
    overrides:          what changes the recipe to this strategy: `hf-distill run RECIPE KEY=VALUE...`
    min_gpus:           the smallest number of GPUs on which it fits; None where it fits on no number of GPUs
    deepspeed_gib:      DeepSpeed's estimate of the student's weights, gradients and optimizer states, in GiB; None
                        where DeepSpeed has no estimate or is not installed
    """

    strategy: Strategy
    is_recipe_strategy: bool
    parts: MemoryBreakdown
    total: int
    fits: bool
    overrides: list[str]
    min_gpus: int | None
    deepspeed_gib: float | None


def estimate_strategies(
    workload: Workload, recipe_strategy: Strategy, gpus: int, usable: int
) -> list[StrategyEstimate]:
    """Estimate the recipe's strategy and the alternatives; the preferred one comes first.

    Args:
        workload: the models and the batch.
        recipe_strategy: the strategy of the recipe.
        gpus: number of GPUs.
        usable: bytes of each GPU that may be used.
    """
    others = [
        strategy
        for strategy in alternatives(workload.method, gpus, workload.teacher_absent_because)
        if strategy != recipe_strategy
    ]
    rows = []
    for strategy in [recipe_strategy, *others]:
        parts = estimate_memory(workload, strategy, gpus)
        changes = [change for change in strategy.overrides if change not in recipe_strategy.overrides]
        if workload.checkpointing and recipe_strategy.student == "fsdp2" != strategy.student:
            changes.append("train.activation_checkpointing=true")  # the recipe may set it in its fsdp_config
        rows.append(
            StrategyEstimate(
                strategy=strategy,
                is_recipe_strategy=strategy == recipe_strategy,
                parts=parts,
                total=parts.total,
                fits=parts.total <= usable,
                overrides=changes,
                min_gpus=min_gpus(workload, strategy, usable),
                deepspeed_gib=deepspeed_estimate(workload, strategy, gpus),
            )
        )
    return sorted(rows, key=lambda row: row.strategy.preference)


def min_gpus(workload: Workload, strategy: Strategy, usable: int) -> int | None:
    """Return the smallest number of GPUs on which a strategy fits; None where it fits on no number of GPUs."""
    fewest = 2 if strategy.is_sharded and not strategy.has_offload else 1
    counts = range(fewest, (_MAX_GPUS if strategy.shards_with_gpus else fewest) + 1)
    i = bisect_left(counts, True, key=lambda n: estimate_memory(workload, strategy.for_gpus(n), n).total <= usable)
    return counts[i] if i < len(counts) else None


def fewest_gpus(workload: Workload, usable: int) -> tuple[int, Strategy] | None:
    """Return the smallest number of GPUs on which any strategy fits, and that strategy; None where none fits."""
    strategies = sorted(
        alternatives(workload.method, 2, workload.teacher_absent_because), key=lambda strategy: strategy.preference
    )
    fitting = [(least, strategy) for strategy in strategies if (least := min_gpus(workload, strategy, usable))]
    return min(fitting, key=lambda pair: pair[0], default=None)


def deepspeed_estimate(workload: Workload, strategy: Strategy, gpus: int) -> float | None:
    """Return DeepSpeed's own estimate of the student's weights, gradients and optimizer states on a GPU, in GiB.

    DeepSpeed counts 18 bytes per parameter (20 under ZeRO-2), where `estimate_memory` counts 16: it adds fp32 gradients
    to the bf16 ones (under ZeRO-2 unsharded), which a step frees again. Of the gathered weights it counts the largest
    layer in fp32. It counts no adapters, activations or reduce buckets.

    Returns:
        GiB; None without DeepSpeed and for other strategies.
    """
    if strategy.student not in ("zero2", "zero3") or workload.lora:
        return None
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)  # on import DeepSpeed logs to stdout which accelerator it selected
    try:
        from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as zero3
        from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as zero2
    except ImportError:
        return None
    finally:
        logging.disable(disabled)
    student, offload = workload.student, strategy.offload_optimizer
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
    """Recommend a strategy in one or two sentences.

    Args:
        rows: the estimates of all strategies.
        cheapest: the estimate with the fewest GPUs.
        best: the preferred estimate on all GPUs.
        gpus: number of GPUs.
        least: the result of `fewest_gpus`.
    """
    recipe_row = next(row for row in rows if row.is_recipe_strategy)
    text = f"The recipe's strategy, {recipe_row.strategy.name}, "
    text += f"{'fits' if recipe_row.fits else 'does not fit'} on {_count(gpus)}"
    if not recipe_row.fits and recipe_row.min_gpus:
        text += f"; it needs {recipe_row.min_gpus}"
    if cheapest is None and least:
        return (
            f"{text}. No strategy fits on {_count(gpus)} of this size: {least[1].name} needs the fewest, "
            f"{_count(least[0])}."
        )
    if cheapest is None:
        return (
            f"{text}. No strategy fits on any number of GPUs of this size: lower train.per_device_train_batch_size or "
            "data.max_length, set train.activation_checkpointing=true, train adapters (student.lora), or offload "
            "(train.deepspeed=zero3-student-offload.json)."
        )
    if cheapest.min_gpus == gpus:
        text += "." if cheapest.is_recipe_strategy else f". The strategy {cheapest.strategy.name} fits."
    elif cheapest.is_recipe_strategy:
        text += f". It also fits on {_count(cheapest.min_gpus or 0)}, with the same number of GPU-hours per token."
    else:
        text += (
            f". The strategy that needs the fewest GPUs is {cheapest.strategy.name}: it fits on "
            f"{_count(cheapest.min_gpus or 0)}, with the same number of GPU-hours per token."
        )
    if best is not None and best is not cheapest and not best.is_recipe_strategy:
        text += f" The preferred strategy on {_count(gpus)} is {best.strategy.name}."
    return text


def _count(gpus: int) -> str:
    return "1 GPU" if gpus == 1 else f"{gpus} GPUs"
