"""Floating-point operations (FLOP): by formula, as torch counts them, and by the rule of thumb (2 N and 6 N)."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from .model_stats import ModelStats, meta_model


@dataclass(frozen=True)
class FlopEstimate:
    """FLOP by the rule of thumb: 2 N per token for a forward, 6 N per token for training (2001.08361).

    teacher: FLOP of the teacher's forward over the tokens
    student: FLOP of training the student on them
    """

    teacher: float
    student: float

    @property
    def total(self) -> float:
        """FLOP of the distillation."""
        return self.teacher + self.student


def rule_of_thumb(teacher_parameters: float, student_parameters: float, tokens: float) -> FlopEstimate:
    """Estimate the FLOP of a distillation: 2 * N_teacher * tokens + 6 * N_student * tokens.

    70e9 into 8e9 parameters on 20e9 tokens: 3.76e21 FLOP, 3.9 % of training the 8e9 on 2e12 tokens.

    Args:
        teacher_parameters: number of parameters of the teacher.
        student_parameters: number of parameters of the student.
        tokens: number of training tokens.

    Returns:
        FLOP of the teacher's forward and of training the student.
    """
    return FlopEstimate(2 * teacher_parameters * tokens, six_nd(student_parameters, tokens))


def six_nd(parameters: float, tokens: float) -> float:
    """Estimate the FLOP of training a model: 6 * N * tokens."""
    return 6 * parameters * tokens


@dataclass(frozen=True)
class Flops:
    """FLOP per token of a sequence of a certain length.

    blocks:    2 * weights of the linear layers that the token passes
    attention: 4 * length * heads * head_dim * L: both products over the full square, as torch counts them
    head:      2 * V * H
    """

    blocks: float
    attention: float
    head: float

    @classmethod
    def of(cls, stats: ModelStats, length: int) -> "Flops":
        """Compute the FLOP by formula; of a mixture of experts only the experts that a token passes count."""
        weights = stats.linear_weights + stats.active * stats.experts
        attention = 4 * length * stats.heads * stats.head_dim * stats.depth
        return cls(2 * weights, attention, 2 * stats.head)

    @property
    def forward(self) -> float:
        """FLOP per token of a forward."""
        return self.blocks + self.attention + self.head

    def training(self, adapters: int | None, checkpointing: bool) -> float:
        """FLOP per token of a forward and a backward.

        Training all weights takes 3 forwards. With adapters, frozen weights take 2, because they only pass the
        gradient on; attention and the adapters take 3. Activation checkpointing adds one more forward of the layers
        (1604.06174). Torch skips the last product of each layer in this recomputation; the formula does not.

        Args:
            adapters: number of parameters of the adapters; None: all weights are trained.
            checkpointing: whether the backward recomputes the layers.
        """
        adapter_forward = 0 if adapters is None else 2 * adapters
        passes = 3 if adapters is None else 2
        recomputed = self.blocks + self.attention + adapter_forward if checkpointing else 0
        return passes * (self.blocks + self.head) + 3 * (self.attention + adapter_forward) + recomputed


def counted_forward(config: PretrainedConfig, length: int) -> int | None:
    """Count the FLOP of a forward over one sequence with torch's FlopCounterMode on the meta device.

    Returns:
        FLOP; None for a model whose experts are stored as one tensor, because torch does not count their product.
    """
    model = meta_model(config).eval()
    if any(p.ndim == 3 for p in model.parameters()):
        return None
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    # The mask is passed in because making one reads values, which tensors on the meta device do not have.
    mask = torch.ones(1, 1, length, length, dtype=model.dtype, device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()
