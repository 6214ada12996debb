"""Memory of one GPU, part by part, in bytes, by formulas of two anatomies and a batch."""

from dataclasses import dataclass, fields
from math import ceil, prod

from .activations import activations, head_gradients, workspace
from .model_stats import ModelStats
from .strategy import SHARDED, Strategy
from .workload import Workload

_LIVE = 10**9  # stage3_max_live_parameters, DeepSpeed's default
_BUCKET = 5 * 10**8  # reduce_bucket_size, DeepSpeed's default, in values
_BUCKETS = {"zero1": 1, "zero2": 2}  # two where communication overlaps, as in the packaged JSON files
_ALL = ("student", "gradients", "optimizer")
_SPLIT = {"zero1": _ALL[2:], "zero2": _ALL[1:], "zero3": _ALL, "fsdp2": _ALL}


@dataclass(frozen=True)
class MemoryBreakdown:
    """Bytes on one GPU, and in host memory.

    teacher:     its weights, or its share of them
    student:     its weights and adapters, or its share
    gradients:   of what is trained
    optimizer:   AdamW's two moments; under DeepSpeed the fp32 weights too
    activations: what the student's blocks keep for the backward, or the teacher's working set if that is larger; an
                 estimate
    head:        the fused head: a chunk of logits, and the gradients that it takes in the forward
    features:    captured of both models
    gathered:    weights and gradients that are there twice for a while
    host:        offloaded, of one process
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
        """On the GPU."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != "host")


def memory(job: Workload, strategy: Strategy, gpus: int, usable: int | None = None) -> MemoryBreakdown:
    """The parts of one GPU's memory.

    Args:
        job: the models and the batch.
        strategy: how they are held.
        gpus: how many there are.
        usable: bytes that may be used; the head takes an eighth of what the rest leaves. None: its least.
    """
    world, each, trained = strategy.processes(gpus), job.trained(strategy), job.trained_parameters
    size = job.teacher_dtype.itemsize
    teacher = {"own": 0, "cache": job.teacher.head * size}.get(
        strategy.teacher
    )  # a cache of hidden states has the head
    teacher = weights(job.teacher, size, strategy.teacher) if teacher is None else teacher
    student = weights(job.student, job.stored(strategy), job.quantization or "whole") + (job.adapters or 0) * each
    held = {
        "teacher": ceil(teacher / gpus) if strategy.teacher in (*SHARDED, "device_map") else teacher,
        "student": student,
        "gradients": trained * each,
        "optimizer": trained * (12 if strategy.deepspeed else 2 * each),
    }
    for part in _SPLIT.get(strategy.student, ()):
        held[part] = ceil(held[part] / world)
    offloaded = {
        "teacher": strategy.offload_teacher,
        "student": strategy.offload_student,
        "gradients": strategy.offload_optimizer,
        "optimizer": strategy.offload_optimizer,
    }
    rest = {
        **{part: 0 if offloaded[part] else size for part, size in held.items()},
        "activations": activations(job, strategy),
        "features": job.captured * job.tokens * job.compute,
        "gathered": gathered(job, strategy, world),
    }
    fixed = head_gradients(job, strategy)
    left = None if usable is None else usable - fixed - sum(rest.values())
    host = sum(size for part, size in held.items() if offloaded[part])
    return MemoryBreakdown(head=fixed + workspace(job, left), host=host, **rest)


def weights(anatomy: ModelStats, itemsize: int, kind: str) -> int:
    """Bytes of a model's weights: parameters * itemsize, and in bitsandbytes' formats what these quantise.

    nf4 (2305.14314): of a linear layer, half a byte a weight, a byte for 64 of them, and four bytes for 256 of those;
    int8 (2208.07339): one byte a weight, four bytes an output. Embeddings, head, norms, biases and experts that are
    kept as one tensor stay in the dtype.
    """
    if kind not in ("nf4", "int8"):
        return anatomy.parameters * itemsize
    shapes = anatomy.linear.values()
    if kind == "int8":
        held = sum(prod(shape) + 4 * shape[1] for shape in shapes)
    else:
        held = sum(_nf4(prod(shape)) for shape in shapes)
    return (anatomy.parameters - anatomy.linear_weights) * itemsize + held


def _nf4(count: int) -> int:
    scales = ceil(count / 64)
    return ceil(count / 2) + scales + 4 * ceil(scales / 256)


def gathered(job: Workload, strategy: Strategy, world: int) -> int:
    """Weights and gradients that are there twice for a while.

    zero3:      the largest block, and the head, or DeepSpeed's 1e9 live parameters if more; the gradient of a block
    fsdp2:      two blocks, as the next is fetched early, and what is in no block; the gradient of a block
    zero1, 2:   DeepSpeed's reduce bucket
    ddp:        its buckets, the gradients once more
    autocast:   copies of the trained linear layers in c, kept until the forward ends
    nf4:        the largest linear layer in the dtype, while it runs
    """
    student, teacher, c = job.student, job.teacher, job.compute
    total = _gathered_shares(job, strategy)
    total += _BUCKETS.get(strategy.student, 0) * min(_BUCKET, job.trained_parameters) * c
    if strategy.student == "ddp" and world > 1:
        total += job.trained_parameters * job.trained(strategy)
    if job.autocast(strategy) and not job.lora:
        total += c * (student.linear_weights + student.experts)
    in_4_bits = [teacher] * (strategy.teacher == "nf4") + [student] * (job.quantization == "nf4")
    return total + 2 * max((prod(shape) for anatomy in in_4_bits for shape in anatomy.linear.values()), default=0)


def _gathered_shares(job: Workload, strategy: Strategy) -> int:
    """Blocks of the model that runs, teacher or student; what is in no block of both."""
    blocks = outside = 0
    for anatomy, kind, size, gradient in (
        (job.teacher, strategy.teacher, job.teacher_dtype.itemsize, 0),
        (job.student, strategy.student, job.compute, 0 if job.lora else job.student.block),
    ):
        if kind in SHARDED:
            live, rest = _at_a_time(anatomy, kind)
            blocks = max(blocks, size * (live + gradient))
            outside += size * rest
    return blocks + outside


def _at_a_time(anatomy: ModelStats, kind: str) -> tuple[int, int]:
    """(parameters of blocks, parameters of what is in none) that are gathered at a time."""
    if kind == "fsdp2":
        return min(2 * anatomy.block, anatomy.parameters - anatomy.outside), anatomy.outside
    live = min(_LIVE, anatomy.parameters) - anatomy.head
    return max(anatomy.block, live), anatomy.head
