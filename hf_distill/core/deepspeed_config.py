"""Ways to hold a teacher that exclude each other; DeepSpeed configs: found, checked, filled. Imports no torch."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import DistillError, did_you_mean, raise_if_any
from .references import is_file


def check_placement(quantization: Any, deepspeed: Any, fsdp: Any, device_map: Any) -> None:
    """Refuse ways to hold a teacher that exclude each other; each is falsy where it is not gone.

    Raises:
        DistillError: which were given, and which to choose.
    """
    ways = {"quantization": quantization, "deepspeed": deepspeed, "fsdp": fsdp}
    given, problems = [name for name, value in ways.items() if value], []
    if len(given) > 1:
        problems.append(
            f"a teacher cannot be held by {' and '.join(given)} at once: choose quantization (each process holds all "
            "of it, in 4 or 8 bits), deepspeed or fsdp (each holds a share, in its dtype); they exclude each other"
        )
    if device_map and (deepspeed or fsdp):
        problems.append("device_map spreads a teacher over the devices of one process, deepspeed and fsdp over many")
    raise_if_any(problems)


def read_deepspeed(config: str | dict[str, Any], folder: Path = Path()) -> dict[str, Any]:
    """The content of a DeepSpeed config.

    Args:
        config: its content; or a JSON file: a path, relative to `folder`, or the name of a packaged one.
        folder: where relative paths start.

    Raises:
        DistillError: there is no such file, or it holds no JSON mapping.
    """
    if isinstance(config, dict):
        return config
    packaged = files("hf_distill.recipes").joinpath("deepspeed")
    found = next((f for f in (folder / config, packaged.joinpath(config)) if is_file(f)), None)
    if found is None:
        known = [f.name for f in packaged.iterdir()]
        raise DistillError(
            f"there is no file {config[:200]!r} in {folder.resolve()}, and no packaged one{did_you_mean(config, known)}"
        )
    try:
        content = json.loads(found.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DistillError(f"{config} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DistillError(f"{config} holds {type(content).__name__}, no mapping")
    return content


def enable_zero3_gather_on_save(args: Any) -> None:
    """Let ZeRO-3 gather a student's weights when it is saved, as a folder for `from_pretrained`, unless told not to.

    Args:
        args: TrainingArguments.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None and config.is_zero3():
        config.config["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)


def check_teacher_config(config: dict[str, Any]) -> None:
    """Refuse what a teacher cannot have: it is sharded and run, never trained.

    Raises:
        DistillError: an optimizer or a scheduler, or another stage than 3; all of it at once.
    """
    problems = [
        f"a teacher is not trained, so its DeepSpeed config has no {name!r} section: remove it"
        for name in ("optimizer", "scheduler")
        if name in config
    ]
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 3:
        problems.append(
            f"zero_optimization.stage is {stage}; a teacher has no gradients and no optimizer to shard, so stage 3, "
            "which shards weights, is the only one that does something for it"
        )
    raise_if_any(problems)


def fill_teacher_config(config: dict[str, Any], hidden_size: int, dtype: str) -> dict[str, Any]:
    """A copy of a teacher's config with its "auto" values filled in, as Trainer does for a student's.

    Args:
        config: see `check_teacher_config`.
        hidden_size: H_t.
        dtype: in which the teacher is loaded: "bfloat16", "float16" or another.
    """
    zero = {**config["zero_optimization"]}
    for key, value in (
        ("stage3_prefetch_bucket_size", int(0.9 * hidden_size**2)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if zero.get(key) == "auto":
            zero[key] = value
    filled = {**config, "zero_optimization": zero}
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if filled.get(key, {}).get("enabled") == "auto":
            filled[key] = {**filled[key], "enabled": dtype == name}
    # DeepSpeed wants to know batches, though it trains nothing here.
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if filled.get(key) == "auto":
            del filled[key]
    if "train_batch_size" not in filled:
        filled.setdefault("train_micro_batch_size_per_gpu", 1)
    return filled
