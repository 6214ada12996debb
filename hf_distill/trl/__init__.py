"""Distillation in TRL's trainers: supervised fine-tuning, and on-policy distillation with TRL's generation."""

from ..errors import require_package

require_package("trl", "trl", "hf_distill.trl")

from .on_policy import OnPolicyDistillConfig, OnPolicyDistillTrainer  # noqa: E402
from .sft import DistillSFTConfig, DistillSFTTrainer  # noqa: E402

__all__ = ["DistillSFTConfig", "DistillSFTTrainer", "OnPolicyDistillConfig", "OnPolicyDistillTrainer"]
