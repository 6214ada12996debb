"""Memory of one GPU, part by part, in bytes, by formulas of two anatomies and a batch."""

from dataclasses import dataclass, fields
from math import ceil, prod

from .anatomy import Anatomy
from .job import Job
from .strategy import SHARDED, Strategy
from .working import activations, head_gradients, workspace

_LIVE = 10**9  # stage3_max_live_parameters, DeepSpeed's default
_BUCKET = 5 * 10**8  # reduce_bucket_size, DeepSpeed's default, in values
_BUCKETS = {"zero1": 1, "zero2": 2}  # two where communication overlaps, as in the packaged JSON files


@dataclass(frozen=True)
class Parts:
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


def memory(job: Job, strategy: Strategy, gpus: int, usable: int | None = None) -> Parts:
    """The parts of one GPU's memory.

    Args:
        job: the models and the batch.
        strategy: how they are held.
        gpus: N.
        usable: bytes that may be used; the head takes an eighth of what the rest leaves. None: its least.
    """
    world = strategy.processes(gpus)
    teacher = weights(job.teacher, job.teacher_dtype.itemsize, strategy.teacher)
    teacher = ceil(teacher / gpus) if strategy.teacher in (*SHARDED, "device_map") else teacher
    adapters, each = job.adapters, job.trained(strategy)
    trained = job.student.parameters if adapters is None else adapters
    student = weights(job.student, job.stored(strategy), job.quantization or "whole") + (adapters or 0) * each
    gradients, optimizer = trained * each, trained * (12 if strategy.deepspeed else 2 * each)
    share = {"zero1": (1, 1, world), "zero2": (1, world, world)}.get(
        strategy.student, (world,) * 3 if strategy.student in SHARDED else (1, 1, 1)
    )
    student, gradients, optimizer = (ceil(x / n) for x, n in zip((student, gradients, optimizer), share, strict=True))
    host = teacher * strategy.offload_teacher + student * strategy.offload_student
    host += (gradients + optimizer) * strategy.offload_optimizer
    rest = {
        "teacher": 0 if strategy.offload_teacher else teacher,
        "student": 0 if strategy.offload_student else student,
        "gradients": 0 if strategy.offload_optimizer else gradients,
        "optimizer": 0 if strategy.offload_optimizer else optimizer,
        "activations": activations(job, strategy),
        "features": job.captured * job.tokens * job.compute,
        "gathered": gathered(job, strategy, world),
    }
    fixed = head_gradients(job, strategy)
    left = None if usable is None else usable - fixed - sum(rest.values())
    return Parts(head=fixed + workspace(job, left), host=host, **rest)


def weights(anatomy: Anatomy, itemsize: int, kind: str) -> int:
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


def gathered(job: Job, strategy: Strategy, world: int) -> int:
    """Weights and gradients that are there twice for a while.

    zero3:      the largest block, and the head, or DeepSpeed's 1e9 live parameters if more; the gradient of a block
    fsdp2:      two blocks, as the next is fetched early, and what is in no block; the gradient of a block
    zero1, 2:   DeepSpeed's reduce bucket
    ddp:        its buckets, the gradients once more
    autocast:   copies of the trained linear layers in c, kept until the forward ends
    nf4:        the largest linear layer in the dtype, while it runs
    """
    student, teacher, c = job.student, job.teacher, job.compute
    adapters = job.adapters
    trained = student.parameters if adapters is None else adapters
    total = 0
    blocks = []
    for anatomy, kind, size in (
        (teacher, strategy.teacher, job.teacher_dtype.itemsize),
        (student, strategy.student, c),
    ):
        if kind not in SHARDED:
            continue
        again = anatomy.block if anatomy is student and not job.lora else 0
        live, outside = _at_a_time(anatomy, kind)
        blocks.append(size * (live + again))
        total += size * outside
    total += max(blocks, default=0)
    if strategy.student in _BUCKETS:
        total += _BUCKETS[strategy.student] * min(_BUCKET, trained) * c
    if strategy.student == "ddp" and world > 1:
        total += trained * job.trained(strategy)
    if job.autocast(strategy) and not job.lora:
        total += c * (student.linear_weights + student.experts)
    if "nf4" in (strategy.teacher, job.quantization):
        held = [teacher] * (strategy.teacher == "nf4") + [student] * (job.quantization == "nf4")
        total += 2 * max(prod(shape) for anatomy in held for shape in anatomy.linear.values())
    return total


def _at_a_time(anatomy: Anatomy, kind: str) -> tuple[int, int]:
    """(parameters of blocks, parameters of what is in none) that are gathered at a time."""
    if kind == "fsdp2":
        return min(2 * anatomy.block, anatomy.parameters - anatomy.outside), anatomy.outside
    live = min(_LIVE, anatomy.parameters) - anatomy.head
    return max(anatomy.block, live), anatomy.head
