"""Memory of one GPU, part by part, in bytes: formulas of the shapes of two models and a batch."""

from dataclasses import dataclass, fields
from math import ceil, prod

from .activations import activation_bytes, head_gradient_bytes, workspace_bytes
from .model_stats import ModelStats
from .strategy import SHARDED, Strategy
from .workload import Workload

_MAX_LIVE_PARAMETERS = 10**9  # DeepSpeed's default of stage3_max_live_parameters
_BUCKET_VALUES = 5 * 10**8  # DeepSpeed's default of reduce_bucket_size
_BUCKETS = {"zero1": 1, "zero2": 2}  # two where communication overlaps, as in the packaged JSON files
_ALL = ("student", "gradients", "optimizer")
_SHARDED_PARTS = {"zero1": _ALL[2:], "zero2": _ALL[1:], "zero3": _ALL, "fsdp2": _ALL}


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one GPU, and bytes in host memory.

    teacher:     the teacher's weights, or this GPU's shard of them, and the output heads of teachers on servers
    student:     the student's weights and adapters, or this GPU's shard of them
    gradients:   gradients of the trained parameters
    optimizer:   AdamW's two moments; under DeepSpeed also the fp32 weights
    activations: estimated activations that the student saves for backward, or the teacher's working set if it is larger
    head:        the fused loss: a chunk of logits, and the gradients that it computes in the forward
    features:    captured features of both models
    gathered:    temporary copies of weights and gradients: gathered shards, buckets, casts
    host:        offloaded bytes of one process
    """

    teacher: int
    student: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    features: int
    gathered: int
    host: int = 0

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


def estimate_memory(workload: Workload, strategy: Strategy, gpus: int) -> MemoryBreakdown:
    """Compute the parts of one GPU's memory.

    Args:
        workload: the models and the batch.
        strategy: the placement of the models.
        gpus: number of GPUs.

    Returns:
        bytes on one GPU and in host memory, by part.
    """
    world, trained_itemsize = strategy.processes(gpus), workload.trained(strategy)
    trained, itemsize = workload.trained_parameters, workload.teacher_dtype.itemsize
    without_model = {
        "self": 0,
        "remote": 0,
        "cache": workload.teacher.head * itemsize,
    }  # a cache of hidden states has the head
    teacher = without_model.get(strategy.teacher)
    teacher = weight_bytes(workload.teacher, itemsize, strategy.teacher) if teacher is None else teacher
    student = weight_bytes(workload.student, workload.stored(strategy), workload.quantization or "full")
    sizes = {
        "teacher": ceil(teacher / gpus) if strategy.teacher in (*SHARDED, "device_map") else teacher,
        "student": student + (workload.adapters or 0) * trained_itemsize,
        "gradients": trained * trained_itemsize,
        "optimizer": trained * (12 if strategy.uses_deepspeed else 2 * trained_itemsize),
    }
    for part in _SHARDED_PARTS.get(strategy.student, ()):
        sizes[part] = ceil(sizes[part] / world)
    offloaded = {
        "teacher": strategy.offload_teacher,
        "student": strategy.offload_student,
        "gradients": strategy.offload_optimizer,
        "optimizer": strategy.offload_optimizer,
    }
    on_gpu = {
        **{part: 0 if offloaded[part] else size for part, size in sizes.items()},
        "activations": activation_bytes(workload, strategy),
        "features": workload.captured * workload.tokens * workload.compute,
        "gathered": gathered_bytes(workload, strategy, world),
    }
    on_gpu["teacher"] += workload.served_heads
    head = head_gradient_bytes(workload, strategy) + workspace_bytes(workload)
    host = sum(size for part, size in sizes.items() if offloaded[part])
    return MemoryBreakdown(head=head, host=host, **on_gpu)


def weight_bytes(stats: ModelStats, itemsize: int, kind: str) -> int:
    """Compute the bytes of a model's weights: parameters * itemsize; less where bitsandbytes quantizes linear layers.

    nf4 (2305.14314): a linear layer takes half a byte per weight, one byte per 64 weights, and four bytes per 256 of
    those; int8 (2208.07339): one byte per weight and four bytes per output. Embeddings, output head, norms, biases and
    experts that are stored as one tensor keep their dtype.

    Args:
        stats: the model.
        itemsize: bytes of a number of its dtype.
        kind: "nf4" or "int8"; anything else: not quantized.
    """
    if kind not in ("nf4", "int8"):
        return stats.parameters * itemsize
    shapes = stats.linear.values()
    if kind == "int8":
        quantized = sum(prod(shape) + 4 * shape[1] for shape in shapes)
    else:
        quantized = sum(_nf4_bytes(prod(shape)) for shape in shapes)
    return (stats.parameters - stats.linear_weights) * itemsize + quantized


def _nf4_bytes(count: int) -> int:
    scales = ceil(count / 64)
    return ceil(count / 2) + scales + 4 * ceil(scales / 256)


def gathered_bytes(workload: Workload, strategy: Strategy, world: int) -> int:
    """Compute the bytes of temporary copies of weights and gradients.

    zero3:      the largest layer and the output head, or DeepSpeed's 1e9 live parameters if more; a layer's gradient
    fsdp2:      two layers, because the next one is prefetched, and the parameters outside layers; a layer's gradient
    zero1, 2:   DeepSpeed's reduce bucket
    ddp:        DDP's buckets, a second copy of the gradients
    autocast:   casts of the trained linear layers to c, which are cached until the forward ends; those of a frozen
                teacher are not, so that only the largest linear layer is counted
    nf4:        the largest linear layer, dequantized while it runs
    """
    student, teacher, c = workload.student, workload.teacher, workload.compute
    total = _gathered_shards(workload, strategy)
    total += _BUCKETS.get(strategy.student, 0) * min(_BUCKET_VALUES, workload.trained_parameters) * c
    if strategy.student == "ddp" and world > 1:
        total += workload.trained_parameters * workload.trained(strategy)
    if workload.autocast(strategy) and not workload.lora:
        total += c * (student.linear_weights + student.experts)
    if workload.autocasts_teacher(strategy) and strategy.teacher != "self":
        total += 2 * max((prod(shape) for shape in teacher.linear.values()), default=0)
    in_4_bits = [teacher] * (strategy.teacher == "nf4") + [student] * (workload.quantization == "nf4")
    return total + 2 * max((prod(shape) for stats in in_4_bits for shape in stats.linear.values()), default=0)


def _gathered_shards(workload: Workload, strategy: Strategy) -> int:
    """Compute the bytes of gathered shards: layers of the running model, and parameters outside layers of both."""
    blocks = outside = 0
    for stats, kind, itemsize, gradient in (
        (workload.teacher, strategy.teacher, workload.teacher_dtype.itemsize, 0),
        (workload.student, strategy.student, workload.compute, 0 if workload.lora else workload.student.block),
    ):
        if kind in SHARDED:
            block_parameters, outside_parameters = _gathered_at_once(stats, kind)
            blocks = max(blocks, itemsize * (block_parameters + gradient))
            outside += itemsize * outside_parameters
    return blocks + outside


def _gathered_at_once(stats: ModelStats, kind: str) -> tuple[int, int]:
    """Return (parameters of layers, parameters outside layers) that are gathered at the same time."""
    if kind == "fsdp2":
        return min(2 * stats.block, stats.parameters - stats.outside), stats.outside
    live = min(_MAX_LIVE_PARAMETERS, stats.parameters) - stats.head
    return max(stats.block, live), stats.head
