"""Plan a recipe: its memory, FLOP and hours, and the strategy that needs the fewest GPUs."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from ..core.defaults import MODEL_FLOP_UTILIZATION, PEAK_TFLOPS, PRETRAINING_TOKENS
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import AUTO, KEPT, LEARNED, map_layers
from ..losses import get_loss
from ..models.quantized_training import check_group_widths
from ..recipe.models import TeacherSpec
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from .cache_size import CachePlan, estimate_caches
from .cost import Cost, Model, cost_of, model_of
from .decoding import Decoding
from .estimates import GiB, StrategyEstimate, advice, estimate_strategies, fewest_gpus
from .flops import six_nd
from .generation import GenerationPlan, GenerationRates, plan_generation
from .pruned import student_config, trimmed_vocab_size
from .served_weights import rounding_memory, served_weights
from .shapes import model_config
from .strategy import Strategy
from .token_ratio import teacher_token_ratio
from .workload import Workload, make_workload

CUDA_CONTEXT_BYTES = GiB  # the CUDA context and the workspaces of its libraries
FRAGMENTATION_SHARE = 0.05

_UNCOUNTED = {
    "online": "the peer's gradients, optimizer states and activations, which equal those of a student of its size",
    "mutual": "the peer's gradients, optimizer states and activations, which equal those of a student of its size",
    "ema": "the averaged weights, 4 bytes per trained parameter",
    "snapshot": "the snapshot, 4 bytes per trained parameter",
    "remote": "the teacher on its server, which must answer for as many tokens per second as the student trains on",
    "mtp": "the MTP heads, each with a layer, a projection of twice the width, and another pass of the output head",
}


@dataclass(frozen=True)
class Plan:
    """The result of `plan`.

    teacher, student:   size and FLOP of the models
    length:             tokens of a sequence
    gpus:               number of GPUs
    gpu_memory:         bytes of a GPU
    usable:             of these, without the CUDA context (1 GiB) and fragmentation (5 %)
    rows:               the estimate of each strategy, the preferred one first
    cost:               FLOP and time of the run with the recipe's strategy
    mfu:                share of the peak that training reaches
    peak_tflops:        peak of a GPU, in TFLOP/s
    pretraining_tokens: number of tokens of the pretraining that the run is compared with
    pretraining:        FLOP of that pretraining by the rule of thumb
    cheapest:           the estimate that needs the fewest GPUs, at most `gpus`; of several the preferred one
    best:               the preferred estimate on all GPUs
    caches:             estimates of a teacher cache; None for a teacher that changes during training
    advice:             which strategy to choose
    decoding:           memory that generating a token reads: of the teacher and of the student
    generation:         the generation of the teacher's completions; None if the recipe has none
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
    decoding: tuple[Decoding, Decoding]
    generation: GenerationPlan | None = None


def plan(
    recipe: Recipe,
    gpus: int,
    gpu_memory: float,
    mfu: float = MODEL_FLOP_UTILIZATION,
    peak_tflops: float = PEAK_TFLOPS,
    pretraining_tokens: float = PRETRAINING_TOKENS,
    rates: GenerationRates | None = None,
) -> Plan:
    """Plan a recipe from the configs of its models; no weights are read.

    Args:
        recipe: the recipe, see `load_recipe`.
        gpus: number of GPUs.
        gpu_memory: memory of each GPU, in GiB.
        mfu: share of the peak that training reaches (model FLOP utilization, recomputation counted).
        peak_tflops: peak of a GPU, in TFLOP/s; 989 is an H100 in bf16, dense.
        pretraining_tokens: number of tokens of a pretraining of the student to compare with.
        rates: rates and lengths of a generation that are not in the recipe; None: the defaults.

    Returns:
        the plan: memory of each strategy, cost, sizes of teacher caches, and advice.

    Raises:
        DistillError: the config of a model is not found, a number is out of range, or a model is sharded on one GPU;
            the error lists all problems; or the recipe has another task than text-generation.
    """
    require_text_generation(recipe, "A plan of memory and FLOP")
    numbers = {"gpus": gpus, "gpu_memory": gpu_memory, "mfu": mfu, "peak_tflops": peak_tflops}
    numbers |= {"pretraining_tokens": pretraining_tokens}
    rates = rates or GenerationRates()
    recipe_strategy, student_config, teacher_config = _check_inputs(recipe, numbers, rates)
    served = [spec for spec in recipe.all_teachers if spec.kind == "remote"]
    served_configs = [_served_config(spec, student_config) for spec in served if spec.api == "hidden"]
    workload = make_workload(recipe, student_config, teacher_config, served_configs)
    memory_bytes = int(gpu_memory * GiB)
    usable = int(memory_bytes * (1 - FRAGMENTATION_SHARE)) - CUDA_CONTEXT_BYTES
    rows = estimate_strategies(workload, recipe_strategy, gpus, usable)
    ratio = teacher_token_ratio(recipe)
    teacher = _teacher_model(recipe, teacher_config, workload, ratio)
    name = recipe.student.model or f"{recipe.primary_teacher.loaded_model}, cut to {workload.student.depth} layers"
    student = model_of(name, student_config, workload.student, workload.length, workload)
    pretraining = six_nd(workload.student.parameters, pretraining_tokens)
    reads_cache = workload.teacher_absent_because in ("cache", "remote")
    running_teacher = replace(teacher, forward=0.0) if reads_cache else teacher
    processes, speed = recipe_strategy.processes(gpus), peak_tflops * 1e12 * mfu
    cost = cost_of(recipe, processes, running_teacher, student, speed, gpus, pretraining)
    fitting = [row for row in rows if row.min_gpus and row.min_gpus <= gpus]
    cheapest = min(fitting, key=lambda row: (row.min_gpus, row.strategy.preference), default=None)
    best = next((row for row in rows if row.fits), None)
    recommendation = advice(rows, cheapest, best, gpus, None if cheapest else fewest_gpus(workload, usable))
    return Plan(
        teacher=teacher,
        student=student,
        length=workload.length,
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
        caches=_plan_caches(recipe, workload, teacher, student, cost.tokens),
        advice="\n".join(
            [
                recommendation,
                *_token_counts(recipe, ratio),
                *_quantized_sizes(recipe, workload),
                *_uncounted_parts(recipe, workload),
            ]
        ),
        decoding=(Decoding.of(workload.teacher), Decoding.of(workload.student)),
        generation=plan_generation(recipe, workload.teacher, rates, usable, speed),
    )


def _teacher_model(recipe: Recipe, config: PretrainedConfig, workload: Workload, ratio: float) -> Model:
    """Return the teacher, whose FLOP are for each token of the student.

    Args:
        recipe: the recipe.
        config: config of the teacher.
        workload: the models and the batch.
        ratio: tokens of the teacher for each token of the student.
    """
    teacher = model_of(_teacher_name(recipe), config, workload.teacher, round(workload.length * ratio))
    counted = None if teacher.counted is None else teacher.counted * ratio
    return replace(teacher, forward=teacher.forward * ratio, counted=counted)


def _token_counts(recipe: Recipe, ratio: float) -> list[str]:
    """Return a sentence about the tokens of a teacher with another tokenizer; nothing for the same tokenizer."""
    if not recipe.is_cross_tokenizer:
        return []
    return [
        f"The teacher has another tokenizer and reads {ratio:.2f} tokens for each token of the student, measured on "
        "the first rows of the data. Its FLOP are those of its own tokens, for each token of the student."
    ]


def _quantized_sizes(recipe: Recipe, workload: Workload) -> list[str]:
    """Return a sentence on the weights of a quantized student; nothing for others.

    Raises:
        DistillError: the groups of its weights do not divide the widths of its layers.
    """
    quantize = recipe.student.quantize
    if quantize is None:
        return []
    check_group_widths(quantize.resolved, {name: width for name, (width, _) in workload.student.linear.items()})
    return [served_weights(workload.student, quantize.resolved)]


def _uncounted_parts(recipe: Recipe, workload: Workload) -> list[str]:
    """Return a sentence for each part of a run that its plan does not count."""
    parts = [_UNCOUNTED[spec.kind] for spec in recipe.all_teachers if spec.kind in _UNCOUNTED]
    others = [
        spec.loaded_model for spec in recipe.all_teachers if spec.loaded_model and spec is not recipe.primary_teacher
    ]
    parts += [f"the teacher {model} and its forward" for model in others]
    parts += ["the time and the KV cache of generating completions"] if recipe.on_policy else []
    parts += [rounding_memory(workload.student)] if recipe.student.quantize else []
    return [f"The plan does not count {part}." for part in dict.fromkeys(parts)]


def _plan_caches(
    recipe: Recipe, workload: Workload, teacher: Model, student: Model, tokens: int | None
) -> CachePlan | None:
    if not recipe.kinds <= {"frozen", "cached"} or recipe.on_policy:
        return None
    layers: set[int] = set()
    for loss in recipe.losses:
        mapping = (loss.model_extra or {}).get("layers", AUTO)
        if get_loss(loss.name).feature == "hidden":
            pairs = map_layers(AUTO if mapping == KEPT else mapping, workload.student.depth, workload.teacher.depth)
            layers |= {*range(workload.teacher.depth)} if mapping == LEARNED else {t for _, t in pairs}
    head = workload.teacher.head * workload.teacher_dtype.itemsize
    return estimate_caches(
        workload.teacher, workload.length, len(layers), teacher.forward, student.training, tokens, head
    )


def _check_inputs(
    recipe: Recipe, numbers: dict[str, float], rates: GenerationRates
) -> tuple[Strategy, PretrainedConfig, PretrainedConfig]:
    """Return the recipe's strategy and the configs of its student and its teacher; raise all problems at once."""
    problems = [f"{name} is {value:g}; it must be above 0." for name, value in numbers.items() if value <= 0]
    problems += rates.problems()
    if numbers["mfu"] > 1:
        problems.append(f"mfu is {numbers['mfu']:g}; it is a share of the peak and must be at most 1.")
    with collect_errors(problems):
        strategy = Strategy.of_recipe(recipe, max(int(numbers["gpus"]), 1))
    spec = recipe.student
    with collect_errors(problems):
        of_teacher = recipe.primary_teacher.loaded_model if recipe.is_cross_tokenizer else None
        revision = recipe.tokenizer_revision if of_teacher is None else recipe.primary_teacher.revision
        teacher = model_config(of_teacher or recipe.tokenizer_model, revision)
        student = (
            teacher
            if spec.from_teacher is None
            else student_config(spec.from_teacher, teacher, trimmed_vocab_size(recipe))
        )
    if spec.model is not None and spec.from_teacher is None:
        with collect_errors(problems):
            student = model_config(spec.model, spec.revision)
    raise_if_any(problems)
    if recipe.primary_teacher.kind == "remote":
        return strategy, student, _served_config(recipe.primary_teacher, student)
    return strategy, student, teacher if recipe.primary_teacher.loaded_model else student


def _served_config(spec: TeacherSpec, student: PretrainedConfig) -> PretrainedConfig:
    """Return the config of a model on a server, if its name is that of a model; that of the student otherwise."""
    return _named_config(spec) or student


def _named_config(spec: TeacherSpec) -> PretrainedConfig | None:
    """Return the config of the model of this name; None if there is none, because a server may use any name."""
    if not spec.model or "/" not in spec.model:
        return None
    try:
        return model_config(spec.model)
    except DistillError:
        return None


def _teacher_name(recipe: Recipe) -> str:
    """Return the name of the teacher: for a model on a server the name under which it is served, if it is given."""
    spec = recipe.primary_teacher
    if spec.kind != "remote":
        return str(recipe.primary_teacher.loaded_model or recipe.tokenizer_model)
    name = f"{spec.model or 'the model'} on a server"
    return name if _named_config(spec) else f"{name}, of unknown size, taken to be as large as the student"
