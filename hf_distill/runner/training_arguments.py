"""What a recipe says to a trainer."""

from typing import Any

import torch
from transformers.utils import logging

from ..core.deepspeed_config import enable_zero3_gather_on_save
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..trainer.config import DistillConfig
from .early_stopping import stopping_arguments
from .on_policy import on_policy_arguments

logger = logging.get_logger(__name__)


def arguments(recipe: Recipe, on_policy: bool = False) -> Any:
    """The arguments of a recipe's trainer, for the machine at hand."""
    losses = [loss.model_dump(exclude_none=True) for loss in recipe.losses]
    projectors = recipe.model_dump(include={"projectors"})["projectors"]
    given = train_arguments(recipe) | recipe.distill.model_dump() | {"losses": losses or None, "projectors": projectors}
    try:
        args = on_policy_arguments(recipe, given) if on_policy else DistillConfig(**given)
    except DistillError:
        raise
    except (ValueError, TypeError) as error:
        raise DistillError(f"train: {error}") from error
    args.dataloader_pin_memory &= torch.accelerator.is_available()
    if recipe.data.scheduled:
        args.train_sampling_strategy = "sequential"
    enable_zero3_gather_on_save(args)
    return args


def train_arguments(recipe: Recipe) -> dict[str, Any]:
    """Of TrainingArguments, for the machine at hand.

    accelerate has FSDP for GPUs alone. On CPUs the student is sharded by transformers as it loads: FSDP2 as well, but
    without checkpoints to resume from.
    """
    train = recipe.train.model_dump(exclude_unset=True, exclude_none=True)  # null stands for the default
    train = {k: v for k, v in train.items() if k != "push_to_hub" and not k.startswith("hub_")}  # published when over
    if train.pop("early_stopping_patience", None):
        train = stopping_arguments(train)
    if torch.accelerator.is_available():
        return train
    train.setdefault("use_cpu", True)  # else processes do not find each other
    if train.get("fsdp"):
        logger.warning("FSDP on CPUs: transformers shards the student as it loads, and the run writes no checkpoints.")
        train = {k: v for k, v in train.items() if k not in ("fsdp", "fsdp_config")} | {"save_strategy": "no"}
    return train
