"""Builds the arguments of the trainer from a recipe."""

from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from transformers.utils import logging

from ..core.deepspeed_config import enable_zero3_gather_on_save
from ..core.devices import default_device
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..trainer.config import DistillConfig
from .early_stopping import stopping_arguments
from .on_policy import on_policy_arguments
from .tasks import task_of

if TYPE_CHECKING:
    from ..trl import OnPolicyDistillConfig

logger = logging.get_logger(__name__)


@overload
def arguments(recipe: Recipe, on_policy: Literal[False] = False) -> DistillConfig: ...
@overload
def arguments(recipe: Recipe, on_policy: Literal[True]) -> "OnPolicyDistillConfig": ...
def arguments(recipe: Recipe, on_policy: bool = False) -> "DistillConfig | OnPolicyDistillConfig":
    """Build the arguments of the trainer of a recipe, for this machine."""
    losses = [loss.model_dump(exclude_none=True) for loss in recipe.losses]
    projectors = recipe.model_dump(include={"projectors"})["projectors"]
    recipe_arguments = (
        train_arguments(recipe)
        | recipe.distill.model_dump(exclude_none=True)
        | {"losses": losses or None, "projectors": projectors}
    )
    try:
        if on_policy:
            args: DistillConfig | OnPolicyDistillConfig = on_policy_arguments(recipe, recipe_arguments)
        else:
            args = task_of(recipe).config_class(**recipe_arguments)
    except DistillError:
        raise
    except (ValueError, TypeError) as error:
        raise DistillError(f"train: {error}") from error
    args._n_gpu = min(args.n_gpu, 1)  # a Trainer would use DataParallel, which does not work with a teacher
    args.dataloader_pin_memory &= default_device().type != "cpu"
    if recipe.data.scheduled:
        args.train_sampling_strategy = "sequential"
    enable_zero3_gather_on_save(args)
    return args


def train_arguments(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of TrainingArguments that a recipe sets, adapted to this machine.

    accelerate supports FSDP on GPUs only. On CPUs, transformers shards the student with FSDP2 while it is loaded, but
    the run cannot write checkpoints.
    """
    train = recipe.train.model_dump(exclude_unset=True, exclude_none=True)  # null means the default
    if train.get("resume_from_checkpoint"):
        raise DistillError(
            "train.resume_from_checkpoint is not read by a run: remove it, and pass --resume, which continues from the "
            "newest complete checkpoint in train.output_dir."
        )
    train = {
        key: value for key, value in train.items() if key != "push_to_hub" and not key.startswith("hub_")
    }  # the run publishes at its end
    if train.pop("early_stopping_patience", None):
        train = stopping_arguments(train)
    if default_device().type != "cpu":
        return train
    if torch.accelerator.is_available() and "use_cpu" not in train:
        logger.warning_once(
            "The GPU of this machine has no float64, in which metrics are summed, so this runs on the CPU."
        )
    train.setdefault("use_cpu", True)  # otherwise the process group is not initialized, or an Apple GPU is used
    if train.get("fsdp"):
        logger.warning(
            "train.fsdp on CPUs: transformers shards the student while it is loaded, and the run writes no "
            "checkpoints, so "
            "it cannot be resumed."
        )
        train = {key: value for key, value in train.items() if key not in ("fsdp", "fsdp_config")} | {
            "save_strategy": "no"
        }
    return train
