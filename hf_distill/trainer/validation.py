"""Arguments of a Trainer that would be ignored, or would ignore the teacher: refused, each with its reason."""

from typing import Any

from accelerate.utils import is_compiled_module

from ..teachers.loading import env_world_size


def incompatible_arguments(trainer: Any) -> list[str]:
    """Why a Trainer with these arguments cannot distil, and what to do."""
    args, problems = trainer.args, trainer.incompatible_arguments()
    if trainer.compute_loss_func is not None:
        problems.append(
            "compute_loss_func replaces the whole loss, so the teacher would be ignored: register it with "
            "@hf_distill.loss and name it in `losses`"
        )
    if args.use_liger_kernel and (args.liger_kernel_config or {}).get("fused_linear_cross_entropy", True):
        problems.append(
            "use_liger_kernel fuses the head with its own cross entropy, which hides the logits: leave it off, or pass "
            "liger_kernel_config={'fused_linear_cross_entropy': False} for the kernels of the layers alone"
        )
    if args.torch_compile or is_compiled_module(trainer.model) or getattr(trainer.model, "_compiled_call_impl", None):
        problems.append(
            "torch_compile would keep the head that is swapped for each step: leave it off, and pass a model that is "
            "not compiled"
        )
    if env_world_size() > 1 and args.world_size == 1:
        problems.append(
            f"the launcher started {env_world_size()} processes, but this one trains alone: on CPUs set use_cpu=True, "
            "so that they find each other"
        )
    if args.fsdp and args.device.type == "cpu":
        problems.append(
            "accelerate does not switch FSDP on for CPUs, so the student would be whole on each process: leave fsdp "
            "out, or load the student with distributed_config=DistributedConfig(fsdp_size=...)"
        )
    if args.n_gpu > 1:
        problems.append(
            f"DataParallel over {args.n_gpu} GPUs cannot share a teacher: start with "
            f"`torchrun --nproc_per_node {args.n_gpu} script.py` or `accelerate launch script.py`"
        )
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
        problems.append(
            "context and sequence parallelism split the rows that the teacher must see whole: switch them off"
        )
    if args.label_names is not None and args.label_names != ["labels"]:
        problems.append(f"label_names is {args.label_names}; targets are read from `labels`: rename the column")
    for name in ("train_dataset", "eval_dataset"):
        data = getattr(trainer, name)
        if data is not None and hasattr(data, "__len__") and len(data) == 0:
            problems.append(f"{name} is empty")
    return problems
