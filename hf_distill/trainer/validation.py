"""Checks for arguments of a Trainer that have a wrong type, or do not work with a teacher."""

import os
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled

from ..core.references import path_exists, reference_kind
from ..models.model_types import model_type_of, unwrap_model
from ..models.placement import is_tensor_parallel
from ..models.quantized_training import is_fake_quantized
from ..teachers.loading import env_world_size
from .compilation import incompatible_compilation
from .sidecar import trained_sidecar


def wrong_arguments(trainer_class: type, loads_models: bool, model: object, args: object) -> list[str]:
    """Describe arguments of a wrong type, which a Trainer does not check before it uses them.

    Args:
        trainer_class: the class of the trainer, for the message.
        loads_models: whether `model` may be a Hub id or a path.
        model: the student that was passed to the trainer.
        args: the training arguments that were passed to the trainer.
    """
    problems = []
    if isinstance(model, str | os.PathLike) and loads_models:
        if reference_kind(path := os.path.expanduser(os.fspath(model))) == "path" and not path_exists(path):
            problems.append(
                f"The student {path} is a path, and there is no such folder. Correct the path (relative paths "
                f"start at {Path.cwd()}), or pass the id of a repository on the Hub, such as org/name"
            )
    elif isinstance(model, str | os.PathLike):
        problems.append(
            f"model is the id or path {str(model)!r}, but {trainer_class.__name__} needs a model, as Trainer does. "
            "Load it first, for example with AutoModelForCausalLM.from_pretrained"
        )
    elif model is not None and not isinstance(model, nn.Module):
        problems.append(f"model has the type {type(model).__name__}. Pass the student, a transformers model")
    if args is not None and not isinstance(args, TrainingArguments):
        problems.append(f"args has the type {type(args).__name__}. Pass a DistillConfig or TrainingArguments")
    if isinstance(model, nn.Module) and isinstance(args, TrainingArguments):
        problems += _missing_methods(model, args)
    return problems


def _missing_methods(model: nn.Module, args: TrainingArguments) -> list[str]:
    """Describe arguments of a Trainer that call methods of transformers models which a student does not have."""
    name, problems = type(model).__name__, []
    if args.label_smoothing_factor and not hasattr(model, "config"):
        problems.append(
            f"label_smoothing_factor is {args.label_smoothing_factor}, for which Trainer reads the config of the "
            f"model, and a {name} has none. Set it to 0, or give the module a `config` (a PretrainedConfig)"
        )
    is_checkpointed = getattr(args, "activation_checkpointing", False) or args.gradient_checkpointing
    if is_checkpointed and not hasattr(model, "gradient_checkpointing_enable"):
        problems.append(
            f"gradient_checkpointing is True, and a {name} has no gradient_checkpointing_enable. Leave it out, or call "
            "torch.utils.checkpoint in the forward of the module"
        )
    if getattr(args, "predict_with_generate", False) and not hasattr(model, "generate"):
        problems.append(
            f"predict_with_generate is True, and a {name} does not generate. Leave it out: `evaluate` then returns the "
            "metrics of the type of the model"
        )
    return problems


def incompatible_arguments(trainer: Trainer) -> list[str]:
    """Return why a trainer cannot distill with its arguments, and what to change; empty if it can."""
    args, problems = trainer.args, list[str]()
    if trainer.compute_loss_func is not None:
        problems.append(
            "compute_loss_func replaces the whole loss, so the teacher would be ignored. Register the function with "
            "@hf_distill.loss and name it in `losses` instead"
        )
    if getattr(args, "share_encoder", False) and not isinstance(trainer, Seq2SeqTrainer):
        problems.append(
            f"share_encoder=True is an option of DistillSeq2SeqTrainer, and {type(trainer).__name__} would run both "
            "encoders. Use DistillSeq2SeqTrainer, or set share_encoder=False"
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        problems.append(
            "use_liger_kernel fuses the output head with the cross entropy, so no logits can be compared. Turn it off, "
            "or pass liger_kernel_config={'fused_linear_cross_entropy': False} to use the kernels of the layers alone"
        )
    problems += incompatible_compilation(cast(nn.Module, trainer.model), args)
    if env_world_size() > 1 and args.world_size == 1:
        problems.append(
            f"the launcher started {env_world_size()} processes, but this one trains alone. On CPUs set use_cpu=True, "
            "so that they train together"
        )
    if args.device.type == "mps":
        problems.append(
            "losses and metrics are summed in float64, which Apple GPUs (mps) do not have. Set use_cpu=True to train "
            "on the CPU"
        )
    if args.fsdp and args.device.type == "cpu":
        problems.append(
            "accelerate does not use FSDP on CPUs, so the student would not be sharded. Remove fsdp, or load the "
            "student with distributed_config=DistributedConfig(fsdp_size=...)"
        )
    if args.world_size > 1 and getattr(args, "ddp_static_graph", None):
        problems.append(
            "ddp_static_graph=True lets DDP start its averages of gradients at an output of the student, but the loss "
            "leaves through its output head, so each process would apply its own gradients. Remove it"
        )
    if args.n_gpu > 1:
        problems.append(
            f"DataParallel over {args.n_gpu} GPUs does not work with a teacher. Start the training with "
            f"`torchrun --nproc_per_node {args.n_gpu} script.py` or `accelerate launch script.py`, or leave GPUs to "
            "the teacher, for example with teacher.to('cuda:1')"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        problems.append(
            "context and sequence parallelism split rows over processes, but a teacher needs complete rows. Turn it off"
        )
    if is_deepspeed_zero3_enabled() and is_fake_quantized(cast(nn.Module, trainer.model)):
        problems.append(
            "the student is quantized, and ZeRO-3 shards the weights that each layer rounds as a whole. Use DDP, "
            "ZeRO-1 or ZeRO-2"
        )
    problems += incompatible_placement(trainer)
    label_names = [*model_type_of(cast(nn.Module, trainer.model)).output_type.label_names]
    if args.label_names is not None and sorted(args.label_names) != sorted(label_names):
        names = " and ".join(f"`{name}`" for name in label_names)
        problems.append(
            f"label_names is {args.label_names}, but the target tokens are read from {names}. Rename the columns to "
            f"{' and '.join(label_names)} and remove label_names"
        )
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name)
        if data is not None and hasattr(data, "__len__") and len(data) == 0:
            problems.append(f"{name} is empty. Pass at least one row, or leave it out")
    return problems


def replaced_loss_problem(trainer_class: type) -> str:
    """Return the error message for a trainer whose `compute_loss` does not use the teacher."""
    return (
        f"compute_loss of {trainer_class.__name__} does not call super().compute_loss, so the teacher is ignored. "
        "Register your loss with @hf_distill.loss and name it in `losses` (with alpha=1 it takes the place of the hard "
        "loss), or add it to the result of super().compute_loss. To train without a teacher, leave `teacher` out."
    )


def nothing_to_train(student: nn.Module) -> list[str]:
    """Return why a student cannot be trained if all of its parameters are frozen; it can still be evaluated.

    Args:
        student: the student, with the trained modules that are attached to it.
    """
    if any(parameter.requires_grad for parameter in student.parameters()):
        return []
    return [
        "no parameter of the student requires a gradient. A trainer freezes its teacher, so a model that was a teacher "
        "before is frozen: call student.requires_grad_(True), or add adapters with peft.get_peft_model"
    ]


def incompatible_sidecar(trainer: Trainer) -> list[str]:
    """Return why modules that are trained with a student cannot be sharded with it; empty if they can, or are none."""
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    is_restored = getattr(plugin, "fsdp_version", 1) == 2 and getattr(plugin, "cpu_ram_efficient_loading", False)
    if not is_restored or trained_sidecar(cast(nn.Module, trainer.model)) is None:
        return []
    return [
        "cpu_ram_efficient_loading of FSDP restores the weights of the student's state dict alone, and the projectors "
        "or learned layers of `losses` would have no values. Set it to False in fsdp_config or in the config of "
        "accelerate, or use losses without projectors and learned layers"
    ]


def incompatible_placement(trainer: Trainer) -> list[str]:
    """Return why a student cannot be distilled where its weights are, and what to change; empty if it can."""
    student: Any = trainer.model
    if trainer.get_tp_size() > 1 or is_tensor_parallel(student):
        return [
            "tensor parallelism (tp_size, tp_plan) divides the output head of the student over processes, and the loss "
            "needs the whole head. Shard the student instead: fsdp=True, deepspeed with ZeRO-3, or "
            "from_pretrained(distributed_config=DistributedConfig(fsdp_size=...))"
        ]
    device_map = getattr(unwrap_model(student), "hf_device_map", None) or {}
    devices = list(dict.fromkeys(device_map.values()))
    if len(devices) > 1:
        return [
            f"the device_map of the student spreads it over {', '.join(map(str, devices))}, but labels and loss are on "
            "one device. Load the student without device_map: fsdp=True or deepspeed shards it over several GPUs, and "
            "quantization with LoRA makes it fit on one. A teacher may be spread"
        ]
    if trainer.is_model_parallel:
        return [
            f"the device_map of the student places it on {devices[0]}, but the Trainer trains on "
            f"{trainer.args.device}. Load the student without device_map, or with that device; the teacher may be "
            "on another one"
        ]
    return []
