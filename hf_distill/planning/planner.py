"""What a recipe needs before it is paid for: memory, operations, hours, and the cheapest strategy that fits."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import LEARNED, map_layers
from ..losses import get_loss
from ..models.pruning import prune_config
from ..recipe.models import FromTeacher
from ..recipe.schema import Recipe
from .cache_size import CachePlan, caches_of
from .cost import Cost, Model, cost_of, model_of
from .estimates import GiB, StrategyEstimate, advice, estimate_strategies, fewest_gpus
from .flops import six_nd
from .shapes import model_config
from .strategy import Strategy
from .workload import Workload, make_workload

CONTEXT = GiB  # the CUDA context and libraries' workspaces
FRAGMENTATION = 0.05

_UNCOUNTED = {
    "online": "the peer's gradients, optimizer and activations, which are those of a student of its size",
    "mutual": "the peer's gradients, optimizer and activations, which are those of a student of its size",
    "ema": "the average, 4 bytes for each trained parameter",
    "snapshot": "the snapshot, 4 bytes for each trained parameter",
    "mtp": "the heads, each of which is a block, a projection of twice the width, and a sweep of the output head",
}


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    length:      tokens a sequence
    gpu_memory:  bytes of a GPU
    usable:      of these, without the CUDA context (1 GiB) and fragmentation (5 %)
    rows:        strategies, the preferred first
    pretraining: FLOP of training the student on so many tokens by the rule of thumb
    cheapest:    the row with the fewest GPUs, at most those given, and of these the one with the least communication
    best:        the row preferred on all GPUs given
    caches:      what a cache of the teacher would take; None of a teacher that moves
    advice:      in words
    """

    teacher: Model
    student: Model
    length: int
    gpus: int
    gpu_memory: int
    usable: int
    rows: list[StrategyEstimate]
    cost: Cost
    mfu: float
    peak_tflops: float
    pretraining_tokens: float
    pretraining: float
    cheapest: StrategyEstimate | None
    best: StrategyEstimate | None
    caches: CachePlan | None
    advice: str


def plan(
    recipe: Recipe,
    gpus: int,
    gpu_memory: float,
    mfu: float = 0.4,
    peak_tflops: float = 989.0,
    pretraining_tokens: float = 2e12,
) -> Plan:
    """What a recipe needs, from the configs of its models; no weights are read.

    Args:
        recipe: see `load_recipe`.
        gpus: how many there are.
        gpu_memory: of each, in GiB.
        mfu: share of the peak that training reaches, recomputation counted.
        peak_tflops: of one GPU, in TFLOP/s; 989: H100, bf16, dense.
        pretraining_tokens: on which the student might have been trained instead.

    Raises:
        DistillError: a model that nobody knows, a number out of range, a sharded strategy on one GPU; all at once.
    """
    numbers = {"gpus": gpus, "gpu_memory": gpu_memory, "mfu": mfu, "peak_tflops": peak_tflops}
    own, student_config, teacher_config = _checked(recipe, numbers | {"pretraining_tokens": pretraining_tokens})
    job = make_workload(recipe, student_config, teacher_config)
    memory_bytes = int(gpu_memory * GiB)
    usable = int(memory_bytes * (1 - FRAGMENTATION)) - CONTEXT
    rows = estimate_strategies(job, own, gpus, usable)
    teacher = model_of(recipe.tokenizer_model, teacher_config, job.teacher, job.length)
    name = recipe.student.model or f"{recipe.primary_teacher.model}, cut to {job.student.depth} blocks"
    student = model_of(name, student_config, job.student, job.length, job)
    pretraining = six_nd(job.student.parameters, pretraining_tokens)
    told = replace(teacher, forward=0.0) if job.teacher_absent_because == "cache" else teacher
    cost = cost_of(recipe, own.processes(gpus), told, student, peak_tflops * 1e12 * mfu, gpus, pretraining)
    could = [row for row in rows if row.min_gpus and row.min_gpus <= gpus]
    cheapest = min(could, key=lambda row: (row.min_gpus, row.strategy.order), default=None)
    best = next((row for row in rows if row.fits), None)
    uncounted = [_UNCOUNTED[spec.kind] for spec in recipe.all_teachers if spec.kind in _UNCOUNTED]
    others = [spec.model for spec in recipe.all_teachers if spec.model and spec is not recipe.primary_teacher]
    uncounted += [f"the teacher {model} and its forward" for model in others]
    uncounted += ["the time and the cache of writing completions"] if recipe.on_policy else []
    return Plan(
        teacher=teacher,
        student=student,
        length=job.length,
        gpus=gpus,
        gpu_memory=memory_bytes,
        usable=usable,
        rows=rows,
        cost=cost,
        mfu=mfu,
        peak_tflops=peak_tflops,
        pretraining_tokens=pretraining_tokens,
        pretraining=pretraining,
        cheapest=cheapest,
        best=best,
        caches=_caches(recipe, job, teacher, student, cost.tokens),
        advice=advice(rows, cheapest, best, gpus, None if cheapest else fewest_gpus(job, usable))
        + "".join(f"\nNot counted: {what}." for what in uncounted),
    )


def _caches(recipe: Recipe, job: Workload, teacher: Model, student: Model, tokens: int | None) -> CachePlan | None:
    if not recipe.kinds <= {"frozen", "cached"} or recipe.on_policy:
        return None
    layers: set[int] = set()
    for loss in recipe.losses:
        mapping = (loss.model_extra or {}).get("layers", "stretch")
        if get_loss(loss.name).feature == "hidden":
            pairs = map_layers(mapping, job.student.depth, job.teacher.depth)
            layers |= {*range(job.teacher.depth)} if mapping == LEARNED else {t for _, t in pairs}
    head = job.teacher.head * job.teacher_dtype.itemsize
    return caches_of(job.teacher, job.length, len(layers), teacher.forward, student.training, tokens, head)


def _checked(recipe: Recipe, numbers: dict[str, float]) -> tuple[Strategy, PretrainedConfig, PretrainedConfig]:
    """The recipe's strategy, its student's config and its teacher's, or all that is wrong at once."""
    problems = [f"{name} is {value:g}; it must be above 0." for name, value in numbers.items() if value <= 0]
    if numbers["mfu"] > 1:
        problems.append(f"mfu is {numbers['mfu']:g}; it is a share of the peak, at most 1.")
    with collect_errors(problems):
        own = Strategy.of_recipe(recipe, max(int(numbers["gpus"]), 1))
    spec = recipe.student
    with collect_errors(problems):
        teacher = model_config(recipe.tokenizer_model, recipe.tokenizer_revision)
        student = teacher if spec.from_teacher is None else _cut(spec.from_teacher, teacher)
    if spec.model is not None and spec.from_teacher is None:
        with collect_errors(problems):
            student = model_config(spec.model, spec.revision)
    raise_if_any(problems)
    return own, student, teacher if recipe.primary_teacher.model else student


def _cut(cut: FromTeacher, teacher: PretrainedConfig) -> PretrainedConfig:
    """Which blocks are kept is known after a look at them; any do for a plan."""
    depth = teacher.get_text_config().num_hidden_layers
    keep = cut.layers or list(range(cut.keep_layers or 0))
    if max(keep) >= depth:
        raise DistillError(f"student.from_teacher keeps block {max(keep)}; the teacher has {depth}, from 0.")
    return prune_config(teacher, keep, depth)
