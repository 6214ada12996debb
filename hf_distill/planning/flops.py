"""Floating-point operations: by formula, as torch counts them, and by the rule of thumb."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PretrainedConfig

from .model_stats import ModelStats, meta_model


@dataclass(frozen=True)
class FlopEstimate:
    """The rule of thumb, in FLOP: 2 N a token forward, 6 N a token of training (2001.08361).

    teacher: forward of the teacher over the tokens
    student: training of the student on them
    """

    teacher: float
    student: float

    @property
    def total(self) -> float:
        """Of the distillation."""
        return self.teacher + self.student


def rule_of_thumb(teacher_parameters: float, student_parameters: float, tokens: float) -> FlopEstimate:
    """2 * N_teacher * tokens + 6 * N_student * tokens.

    70e9 into 8e9 on 20e9 tokens: 3.76e21 FLOP, 3.9 % of training the 8e9 on 2e12 tokens.
    """
    return FlopEstimate(2 * teacher_parameters * tokens, six_nd(student_parameters, tokens))


def six_nd(parameters: float, tokens: float) -> float:
    """6 * N * tokens, in FLOP."""
    return 6 * parameters * tokens


@dataclass(frozen=True)
class Flops:
    """Operations for one token of a sequence of a given length, in FLOP.

    blocks:    2 * weights of the linear layers that the token passes
    attention: 4 * length * heads * head_dim * L: both products, for the whole square, as torch counts it
    head:      2 * V * H
    """

    blocks: float
    attention: float
    head: float

    @classmethod
    def of(cls, anatomy: ModelStats, length: int) -> "Flops":
        """By formula; of experts only those that the token passes."""
        weights = anatomy.linear_weights + anatomy.active * anatomy.experts
        attention = 4 * length * anatomy.heads * anatomy.head_dim * anatomy.depth
        return cls(2 * weights, attention, 2 * anatomy.head)

    @property
    def forward(self) -> float:
        """A forward."""
        return self.blocks + self.attention + self.head

    def training(self, adapters: int | None, checkpointing: bool) -> float:
        """A forward and a backward.

        All weights: 3 forwards. Adapters: 2 for weights that only pass the gradient on, 3 for attention and for
        themselves. Activation checkpointing: the blocks' forward once more (1604.06174); torch leaves the last product
        of each block out of it, which is not counted.

        Args:
            adapters: how many parameters adapters have; None: all weights are trained.
            checkpointing: whether blocks are computed again in the backward.
        """
        own = 0 if adapters is None else 2 * adapters
        passes = 3 if adapters is None else 2
        again = self.blocks + self.attention + own if checkpointing else 0
        return passes * (self.blocks + self.head) + 3 * (self.attention + own) + again


def counted_forward(config: PretrainedConfig, length: int) -> int | None:
    """FLOP of a forward over one sequence, as torch's FlopCounterMode counts them on the meta device.

    None for a model whose experts are kept as one tensor: torch does not count their product.
    """
    model = meta_model(config).eval()
    if any(p.ndim == 3 for p in model.parameters()):
        return None
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, length, length, dtype=model.dtype, device="meta")  # given, as making one looks at values
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    return counter.get_total_flops()
