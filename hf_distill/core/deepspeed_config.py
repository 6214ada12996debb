"""Placement options of a teacher, and DeepSpeed configs: read, checked and filled in. Imports no torch."""

import json
from importlib.resources import files
from pathlib import Path

from ..errors import DistillError, did_you_mean, raise_if_any
from .json_types import JSONObject
from .references import is_file


def check_placement(quantization: object, deepspeed: object, fsdp: object, device_map: object) -> None:
    """Check that the placement options of a teacher do not exclude each other; an option that is not set is falsy.

    Raises:
        DistillError: options that exclude each other are set; the message says which to choose.
    """
    options = {"quantization": quantization, "deepspeed": deepspeed, "fsdp": fsdp}
    names, problems = [name for name, value in options.items() if value], []
    if len(names) > 1:
        problems.append(
            f"a teacher cannot be loaded with {' and '.join(names)} at once, because they exclude each other: choose "
            "quantization (each process has the full model, in 4 or 8 bits), or deepspeed or fsdp (each process has a "
            "shard, in the model's dtype)"
        )
    if device_map and (deepspeed or fsdp):
        problems.append(
            "device_map spreads a teacher over the devices of one process, and deepspeed and fsdp shard it over "
            "several processes: remove device_map, or deepspeed and fsdp"
        )
    raise_if_any(problems)


def read_deepspeed(config: str | JSONObject, folder: Path = Path()) -> JSONObject:
    """Return the content of a DeepSpeed config.

    Args:
        config: the content; or a JSON file: a path, relative to `folder`, or the name of a packaged config.
        folder: folder that relative paths start from.

    Raises:
        DistillError: the file does not exist, or holds no JSON mapping.
    """
    if isinstance(config, dict):
        return config
    packaged = files("hf_distill.recipes").joinpath("deepspeed")
    file = next((f for f in (folder / config, packaged.joinpath(config)) if is_file(f)), None)
    if file is None:
        known = [f.name for f in packaged.iterdir()]
        raise DistillError(
            f"there is no file {config[:200]!r} in {folder.resolve()}, and no packaged config with this name"
            f"{did_you_mean(config, known)}"
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DistillError(f"{config} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DistillError(f"{config} holds a {type(content).__name__}; a DeepSpeed config must be a JSON mapping")
    return content


def enable_zero3_gather_on_save(args: object) -> None:
    """Let ZeRO-3 gather a student's weights when it is saved, so that `from_pretrained` can load the folder.

    A value that the user set for it in the DeepSpeed config stays.

    Args:
        args: TrainingArguments.
    """
    config = getattr(args, "hf_deepspeed_config", None)
    if config is not None and config.is_zero3():
        config.config["zero_optimization"].setdefault("stage3_gather_16bit_weights_on_model_save", True)


def check_teacher_config(config: JSONObject) -> None:
    """Check the DeepSpeed config of a teacher, which is sharded and run but not trained.

    Raises:
        DistillError: it has an optimizer or a scheduler, or a ZeRO stage other than 3; the message names all problems.
    """
    problems = [
        f"a teacher is not trained, so its DeepSpeed config must have no {name!r} section: remove it"
        for name in ("optimizer", "scheduler")
        if name in config
    ]
    stage = zero_options(config).get("stage", 0)
    if stage != 3:
        problems.append(
            f"zero_optimization.stage is {stage}; a teacher has no gradients and no optimizer states to shard: use "
            "stage 3, which shards weights"
        )
    raise_if_any(problems)


def fill_teacher_config(config: JSONObject, hidden_size: int, dtype: str) -> JSONObject:
    """Return a copy of a teacher's config with its "auto" values filled in, as Trainer does for a student.

    Args:
        config: a config that `check_teacher_config` accepts.
        hidden_size: H_t.
        dtype: dtype that the teacher is loaded in: "bfloat16", "float16" or another.
    """
    zero = {**zero_options(config)}
    for key, value in (
        ("stage3_prefetch_bucket_size", int(0.9 * hidden_size**2)),
        ("stage3_param_persistence_threshold", 10 * hidden_size),
    ):
        if zero.get(key) == "auto":
            zero[key] = value
    filled: JSONObject = {**config, "zero_optimization": zero}
    for key, name in (("bf16", "bfloat16"), ("fp16", "float16")):
        if (section := _section(filled, key)).get("enabled") == "auto":
            filled[key] = {**section, "enabled": dtype == name}
    # DeepSpeed requires a batch size although nothing is trained.
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        if filled.get(key) == "auto":
            del filled[key]
    if "train_batch_size" not in filled:
        filled.setdefault("train_micro_batch_size_per_gpu", 1)
    return filled


def zero_options(config: object) -> JSONObject:
    """Return the section `zero_optimization` of the content of a DeepSpeed config; an empty one if it has none."""
    return _section(config, "zero_optimization") if isinstance(config, dict) else {}


def _section(config: JSONObject, name: str) -> JSONObject:
    """Return a section of a config; an empty one if it is missing or no mapping."""
    section = config.get(name)
    return section if isinstance(section, dict) else {}
