"""FLOP of a run and the time that they take."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from ..recipe.schema import Recipe
from .flops import Flops, counted_forward, rule_of_thumb, six_nd
from .model_stats import ModelStats
from .workload import Workload


@dataclass(frozen=True)
class Model:
    """Size and FLOP of a model.

    name:       its id or path
    parameters: number of all parameters
    trained:    number of trained parameters; 0 for the teacher
    forward:    FLOP per token of a forward, by formula
    counted:    the same, counted by torch's FlopCounterMode; None where torch does not count every operation
    training:   FLOP per token of a forward and a backward; 0 for the teacher
    """

    name: str
    parameters: int
    trained: int
    forward: float
    counted: float | None
    training: float


@dataclass(frozen=True)
class Cost:
    """FLOP and time of a run with the recipe's strategy.

    tokens_per_step:   tokens of an optimizer step over all processes, gradient accumulation included
    tokens:            tokens of the run; None where the recipe counts epochs, because the length of the data is unknown
    flop_per_token:    the teacher's forward and the student's training
    flop:              FLOP of the run, its control included; None where `tokens` is None
    rule:              the same by the rule of thumb
    tokens_per_second: at the specified share of the GPUs' peak
    gpu_hours:         GPU-hours of the run
    share:             `flop` / FLOP of pretraining the student
    control:           FLOP of training the control, which `flop` includes; 0 without a control
    """

    tokens_per_step: int
    tokens: int | None
    flop_per_token: float
    flop: float | None
    rule: float | None
    tokens_per_second: float
    gpu_hours: float | None
    share: float | None
    control: float | None = 0.0


def model_of(
    name: str, config: PretrainedConfig, stats: ModelStats, length: int, workload: Workload | None = None
) -> Model:
    """Compute the FLOP of a model; for the student pass the workload that trains it."""
    flops, counted = Flops.of(stats, length), counted_forward(config, length)
    trained = 0 if workload is None else stats.parameters if workload.adapters is None else workload.adapters
    training = 0.0 if workload is None else flops.training(workload.adapters, workload.checkpointing)
    return Model(name, stats.parameters, trained, flops.forward, counted and counted / length, training)


def cost_of(
    recipe: Recipe, processes: int, teacher: Model, student: Model, speed: float, gpus: int, pretraining: float
) -> Cost:
    """Compute the cost of a recipe.

    Args:
        recipe: the recipe, for its batch size and its number of steps.
        processes: number of training processes.
        teacher: the teacher.
        student: the student.
        speed: FLOP/s of a process.
        gpus: number of GPUs whose hours are counted.
        pretraining: FLOP of pretraining the student.
    """
    train = recipe.train
    rows = (train.per_device_train_batch_size or 8) * (train.gradient_accumulation_steps or 1) * processes
    step = rows * recipe.data.max_length
    per_token = teacher.forward + student.training
    per_second = processes * speed / per_token
    # The same student on the same tokens, without a teacher, or distilled in full precision.
    controls = {"sft": student.training, "sft_on_data": student.training, "full_precision": per_token}
    control_flop = controls.get(recipe.control or "", 0.0)
    if (train.max_steps or 0) <= 0:
        return Cost(step, None, per_token, None, None, per_second, None, None, None if control_flop else 0.0)
    tokens = train.max_steps * step
    rule = rule_of_thumb(teacher.parameters, student.parameters, tokens).total
    control = tokens * control_flop
    if recipe.control == "full_precision":
        rule *= 2
    elif control_flop:
        rule += six_nd(student.parameters, tokens)
    flop = tokens * per_token + control
    hours = flop / (processes * speed) / 3600
    return Cost(step, tokens, per_token, flop, rule, per_second, gpus * hours, flop / pretraining, control)
