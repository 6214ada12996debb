"""What a run computes, and how long that takes."""

from dataclasses import dataclass

from transformers import PretrainedConfig

from ..recipe.schema import Recipe
from .flops import Flops, counted_forward, rule_of_thumb, six_nd
from .model_stats import ModelStats
from .workload import Workload


@dataclass(frozen=True)
class Model:
    """A model's size and operations.

    forward:  FLOP a token, by formula
    counted:  the same, by torch's FlopCounterMode; None where torch does not count all of it
    training: FLOP a token of a forward and a backward; 0 for the teacher
    """

    name: str
    parameters: int
    trained: int
    forward: float
    counted: float | None
    training: float


@dataclass(frozen=True)
class Cost:
    """What the recipe's own strategy computes and takes.

    tokens_per_step:   over all processes, accumulation included
    tokens:            of the run; None where the recipe counts epochs, as the length of the data is unknown
    flop_per_token:    teacher's forward and student's training
    flop:              of the run, the control included; None as `tokens`
    control:           FLOP of training the control, which is a part of `flop`; 0 without one
    rule:              the same by the rule of thumb
    tokens_per_second: at the share of the GPUs' peak that was given
    gpu_hours:         of the run
    share:             `flop` over pretraining the student
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
    name: str, config: PretrainedConfig, anatomy: ModelStats, length: int, job: Workload | None = None
) -> Model:
    """A model's operations; of the student, with the job that trains it."""
    flops, counted = Flops.of(anatomy, length), counted_forward(config, length)
    trained = 0 if job is None else anatomy.parameters if job.adapters is None else job.adapters
    training = 0.0 if job is None else flops.training(job.adapters, job.checkpointing)
    return Model(name, anatomy.parameters, trained, flops.forward, counted and counted / length, training)


def cost_of(
    recipe: Recipe, processes: int, teacher: Model, student: Model, speed: float, gpus: int, pretraining: float
) -> Cost:
    """The cost of a recipe.

    Args:
        recipe: its batches and steps count.
        processes: how many train.
        teacher: the teacher.
        student: the student.
        speed: FLOP/s of a process.
        gpus: how many are paid for.
        pretraining: FLOP of the student's.
    """
    train = recipe.train
    rows = (train.per_device_train_batch_size or 8) * (train.gradient_accumulation_steps or 1) * processes
    step = rows * recipe.data.max_length
    per_token = teacher.forward + student.training
    per_second = processes * speed / per_token
    has_control = recipe.control == "sft"  # the same student on the same tokens, without a teacher
    if (train.max_steps or 0) <= 0:
        return Cost(step, None, per_token, None, None, per_second, None, None, None if has_control else 0.0)
    tokens = train.max_steps * step
    rule = rule_of_thumb(teacher.parameters, student.parameters, tokens).total
    control = tokens * student.training if has_control else 0.0
    rule += six_nd(student.parameters, tokens) if has_control else 0.0
    flop = tokens * per_token + control
    hours = flop / (processes * speed) / 3600
    return Cost(step, tokens, per_token, flop, rule, per_second, gpus * hours, flop / pretraining, control)
