"""The models and the batch of a run: what its memory depends on, whatever the placement of the models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig

from ..core.loss_kinds import EMBEDDING
from ..layers import AUTO, KEPT, LEARNED, map_layers
from ..losses import get_loss
from ..recipe.losses import LossSpec
from ..recipe.models import Lora
from ..recipe.schema import Recipe
from .model_stats import ModelStats
from .strategy import Strategy, teacher_absence


@dataclass(frozen=True)
class Workload:
    """The models and the batch of a run.

    student:         the student
    teacher:         the teacher
    batch:           B, rows of a process in a micro-batch
    length:          S, tokens of a row
    student_dtype:   dtype in which the student is loaded
    teacher_dtype:   dtype in which the teacher is loaded
    mixed_precision: whether it trains with bf16=True or fp16=True
    fp16:            whether it trains with fp16=True
    checkpointing:   whether it trains with activation checkpointing
    lora:            the student's adapters; None: all weights are trained
    quantization:    "nf4" or "int8" of the student (QLoRA)
    rounds:          whether the student is trained with rounded weights (`student.quantize`)
    captured:        number of captured feature values per token, of both models
    chunk_tokens:    target tokens in a chunk of the fused loss; None: it follows from the shapes
    served_heads:    bytes of the output heads that servers with api hidden send to the student's device
    device:          "cuda" or "cpu", on which the workspace of the fused loss depends

    `teacher_absent_because` names why no teacher model is loaded: "self", the teacher is the student in another state;
    "cache", it is a teacher cache; "remote", it is on a server; "": a teacher model is loaded.
    """

    student: ModelStats
    teacher: ModelStats
    batch: int
    length: int
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.bfloat16
    mixed_precision: bool = False
    fp16: bool = False
    checkpointing: bool = False
    lora: Lora | None = None
    quantization: str | None = None
    rounds: bool = False
    teacher_absent_because: str = ""
    captured: int = 0
    chunk_tokens: int | None = None
    served_heads: int = 0
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch, T."""
        return self.batch * self.length

    @property
    def method(self) -> str:
        """Training method: full, quantized, lora or qlora."""
        if self.rounds:
            return "quantized"
        return "qlora" if self.quantization else "lora" if self.lora else "full"

    @cached_property
    def adapters(self) -> int | None:
        """Number of parameters of the adapters; None where all weights are trained."""
        return None if self.lora is None else self.student.adapters(self.lora.r, self.lora.target_modules)

    @property
    def trained_parameters(self) -> int:
        """Number of trained parameters."""
        return self.student.parameters if self.adapters is None else self.adapters

    @property
    def compute(self) -> int:
        """Bytes of a number in the compute dtype of the student, c."""
        return 2 if self.mixed_precision else self.student_dtype.itemsize

    @property
    def rounds_gradient(self) -> bool:
        """Whether the gradient of the logits is rounded to bf16: a bf16 student on a GPU; see `core/matmul.py`."""
        is_bf16 = not self.fp16 if self.mixed_precision else self.student_dtype == torch.bfloat16
        return self.device != "cpu" and is_bf16

    def stored(self, strategy: Strategy) -> int:
        """Return the bytes of a parameter of the student: DeepSpeed casts the model, FSDP2 trains fp32 weights."""
        if strategy.uses_deepspeed:
            return self.compute
        return (
            4 if strategy.student == "fsdp2" and self.mixed_precision and not self.lora else self.student_dtype.itemsize
        )

    def trained(self, strategy: Strategy) -> int:
        """Return the bytes of a trained parameter: peft keeps adapters in fp32."""
        return 4 if self.lora and not strategy.uses_deepspeed else self.stored(strategy)

    def autocast(self, strategy: Strategy) -> bool:
        """Whether autocast casts fp32 weights to the compute dtype in each forward."""
        return strategy.student in ("single", "ddp") and self.stored(strategy) > self.compute

    def autocasts_teacher(self, strategy: Strategy) -> bool:
        """Whether the teacher runs under autocast: it is in fp32, not quantized, and not in a DeepSpeed engine."""
        is_model = strategy.teacher not in ("cache", "remote", "nf4", "int8", "zero3")
        return is_model and self.mixed_precision and self.teacher_dtype == torch.float32

    def teacher_compute(self, strategy: Strategy) -> int:
        """Return the bytes of a number in the dtype in which the teacher computes."""
        return 2 if self.autocasts_teacher(strategy) else self.teacher_dtype.itemsize


def make_workload(
    recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig, served: Sequence[PretrainedConfig] = ()
) -> Workload:
    """Return the workload of a recipe.

    Args:
        recipe: the recipe.
        student: the config of its student.
        teacher: the config of its teacher.
        served: the configs of its teachers on servers with api hidden.

    Raises:
        DistillError: a layer mapping names layers that a model does not have.
    """
    spec, train = recipe.student, recipe.train
    attention = spec.attn_implementation or (recipe.primary_teacher.attn_implementation if spec.from_teacher else None)
    student_stats = ModelStats.of(student, attention)
    teacher_stats = ModelStats.of(teacher, recipe.primary_teacher.attn_implementation)
    fsdp_config = train.fsdp_config if isinstance(train.fsdp_config, dict) else {}
    teacher_dtype = recipe.primary_teacher.dtype if recipe.primary_teacher.loaded_model else spec.dtype
    length = recipe.data.max_length
    return Workload(
        student=student_stats,
        teacher=teacher_stats,
        batch=train.per_device_train_batch_size or 8,
        length=length,
        student_dtype=_dtype(spec.dtype, student_stats),
        teacher_dtype=_dtype(teacher_dtype, teacher_stats),
        mixed_precision=bool(train.bf16 or train.fp16),
        fp16=bool(train.fp16),
        checkpointing=bool(
            train.activation_checkpointing
            or train.gradient_checkpointing
            or fsdp_config.get("activation_checkpointing", False)
        ),
        lora=spec.lora,
        quantization=spec.quantization,
        rounds=spec.quantize is not None,
        teacher_absent_because=teacher_absence(recipe),
        chunk_tokens=train.chunk_tokens,
        served_heads=sum(stats.head * stats.dtype.itemsize for stats in map(ModelStats.of, served)),
        captured=sum(_captured_values(loss, student_stats, teacher_stats, length) for loss in recipe.losses),
    )


def _dtype(name: str, stats: ModelStats) -> torch.dtype:
    return stats.dtype if name == "auto" else getattr(torch, name)


def _captured_values(spec: LossSpec, student: ModelStats, teacher: ModelStats, length: int) -> int:
    """Count the values that a loss on features captures per token, over the mapped layers of both models."""
    kind, options = get_loss(spec.name).feature, spec.model_extra or {}
    if kind is None:
        return 0
    if kind == EMBEDDING:  # one vector for each row
        return math.ceil((student.hidden + teacher.hidden) / length)
    layers = options.get("layers", AUTO)
    pairs = map_layers(AUTO if layers == KEPT else layers, student.depth, teacher.depth)
    teacher_layers = teacher.depth if layers == LEARNED else len({t for _, t in pairs})
    student_width, teacher_width = (
        {"hidden": a.hidden, "values": a.kv_heads * a.head_dim, "attention": a.heads * length}[kind]
        for a in (student, teacher)
    )
    return len({s for s, _ in pairs}) * student_width + teacher_layers * teacher_width
