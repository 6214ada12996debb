"""Checks for arguments of a Trainer that do not work with a teacher."""

from typing import Any

from accelerate.utils import is_compiled_module

from ..teachers.loading import env_world_size


def incompatible_arguments(trainer: Any) -> list[str]:
    """Return why a trainer cannot distill with its arguments, and what to change; empty if it can."""
    args, problems = trainer.args, trainer.incompatible_arguments()
    if trainer.compute_loss_func is not None:
        problems.append(
            "compute_loss_func replaces the whole loss, so the teacher would be ignored. Register the function with "
            "@hf_distill.loss and name it in `losses` instead"
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        problems.append(
            "use_liger_kernel fuses the output head with the cross entropy, so no logits can be compared. Turn it off, "
            "or pass liger_kernel_config={'fused_linear_cross_entropy': False} to use the kernels of the layers alone"
        )
    if args.torch_compile or is_compiled_module(trainer.model) or getattr(trainer.model, "_compiled_call_impl", None):
        problems.append(
            "torch_compile does not work with the output head, which is replaced in each step. Turn it off, and pass a "
            "model that is not compiled"
        )
    if env_world_size() > 1 and args.world_size == 1:
        problems.append(
            f"the launcher started {env_world_size()} processes, but this one trains alone. On CPUs set use_cpu=True, "
            "so that they train together"
        )
    if args.fsdp and args.device.type == "cpu":
        problems.append(
            "accelerate does not use FSDP on CPUs, so the student would not be sharded. Remove fsdp, or load the "
            "student with distributed_config=DistributedConfig(fsdp_size=...)"
        )
    if args.n_gpu > 1:
        problems.append(
            f"DataParallel over {args.n_gpu} GPUs does not work with a teacher. Start the training with "
            f"`torchrun --nproc_per_node {args.n_gpu} script.py` or `accelerate launch script.py`"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        problems.append(
            "context and sequence parallelism split rows over processes, but a teacher needs complete rows. Turn it off"
        )
    if args.label_names is not None and args.label_names != ["labels"]:
        problems.append(
            f"label_names is {args.label_names}, but the target tokens are read from `labels`. Rename the column to "
            "labels and remove label_names"
        )
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name)
        if data is not None and hasattr(data, "__len__") and len(data) == 0:
            problems.append(f"{name} is empty. Pass at least one row, or leave it out")
    return problems
