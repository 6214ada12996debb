"""What a run asks of memory, whichever way its models are held."""

from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PretrainedConfig

from ..layers import LEARNED, map_layers
from ..losses import get_loss
from ..recipe.losses import LossSpec
from ..recipe.models import Lora
from ..recipe.schema import Recipe
from .model_stats import ModelStats
from .strategy import Strategy, teacher_absence


@dataclass(frozen=True)
class Workload:
    """What is asked of memory whichever way the models are held.

    student:       the student
    teacher:       the teacher
    batch:         B, rows of a process at a time
    length:        S, tokens a row
    student_dtype: in which the student is loaded
    teacher_dtype: in which the teacher is loaded
    mixed:         whether it trains with bf16=True or fp16=True
    checkpointing: activation checkpointing
    lora:          the student's adapters; None: all weights are trained
    quantization:  "nf4" or "int8" of the student (QLoRA)
    absent:        why no teacher is in memory: "own", the student in another state; "cache", it is on disk; "": one is
    captured:      values that features keep of each token, of both models
    device:        "cuda" or "cpu": the head's workspace differs
    """

    student: ModelStats
    teacher: ModelStats
    batch: int
    length: int
    student_dtype: torch.dtype = torch.float32
    teacher_dtype: torch.dtype = torch.bfloat16
    mixed: bool = False
    checkpointing: bool = False
    lora: Lora | None = None
    quantization: str | None = None
    teacher_absent_because: str = ""
    captured: int = 0
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """T."""
        return self.batch * self.length

    @property
    def method(self) -> str:
        """full, lora or qlora."""
        return "qlora" if self.quantization else "lora" if self.lora else "full"

    @cached_property
    def adapters(self) -> int | None:
        """Parameters of the adapters; None where all weights are trained."""
        return None if self.lora is None else self.student.adapters(self.lora.r, self.lora.target_modules)

    @property
    def trained_parameters(self) -> int:
        """What has a gradient."""
        return self.student.parameters if self.adapters is None else self.adapters

    @property
    def compute(self) -> int:
        """c of the student."""
        return 2 if self.mixed else self.student_dtype.itemsize

    def stored(self, strategy: Strategy) -> int:
        """Bytes of one of the student's parameters: DeepSpeed casts the model, FSDP2 keeps what is trained in fp32."""
        if strategy.deepspeed:
            return self.compute
        return 4 if strategy.student == "fsdp2" and self.mixed and not self.lora else self.student_dtype.itemsize

    def trained(self, strategy: Strategy) -> int:
        """Bytes of a trained parameter: peft keeps adapters in fp32."""
        return 4 if self.lora and not strategy.deepspeed else self.stored(strategy)

    def autocast(self, strategy: Strategy) -> bool:
        """Whether fp32 weights are cast to bf16 whenever they are used."""
        return strategy.student in ("single", "ddp") and self.stored(strategy) > self.compute


def make_workload(recipe: Recipe, student: PretrainedConfig, teacher: PretrainedConfig) -> Workload:
    """A recipe's models and batch, as memory sees them.

    Raises:
        DistillError: a mapping names layers that a model does not have.
    """
    spec, train = recipe.student, recipe.train
    attention = spec.attn_implementation or (recipe.primary_teacher.attn_implementation if spec.from_teacher else None)
    own = ModelStats.of(student, attention)
    other = ModelStats.of(teacher, recipe.primary_teacher.attn_implementation)
    wrapped = train.fsdp_config.get("activation_checkpointing", False) if isinstance(train.fsdp_config, dict) else False
    length = recipe.data.max_length
    return Workload(
        student=own,
        teacher=other,
        batch=train.per_device_train_batch_size or 8,
        length=length,
        student_dtype=_dtype(spec.dtype, own),
        teacher_dtype=_dtype(recipe.primary_teacher.dtype if recipe.primary_teacher.model else spec.dtype, other),
        mixed=bool(train.bf16 or train.fp16),
        checkpointing=bool(train.activation_checkpointing or train.gradient_checkpointing or wrapped),
        lora=spec.lora,
        quantization=spec.quantization,
        teacher_absent_because=teacher_absence(recipe),
        captured=sum(_captured(loss, own, other, length) for loss in recipe.losses),
    )


def _dtype(name: str, anatomy: ModelStats) -> torch.dtype:
    return anatomy.dtype if name == "auto" else getattr(torch, name)


def _captured(spec: LossSpec, student: ModelStats, teacher: ModelStats, length: int) -> int:
    """Values that a term on features keeps of each token, of the mapped layers of both models."""
    kind, options = get_loss(spec.name).feature, spec.model_extra or {}
    if kind is None:
        return 0
    layers = options.get("layers", "stretch")
    pairs = map_layers(layers, student.depth, teacher.depth)
    told = teacher.depth if layers == LEARNED else len({t for _, t in pairs})
    own, other = (
        {"hidden": a.hidden, "values": a.kv_heads * a.head_dim, "attention": a.heads * length}[kind]
        for a in (student, teacher)
    )
    return len({s for s, _ in pairs}) * own + told * other
