"""What a recipe from the Hub may not say: it is data of a stranger until its user says otherwise on the command line.

Everything is refused that is not known to be harmless: fields of TrainingArguments, sections of a DeepSpeed config and
implementations of attention are listed here by name, so that a new one is a decision.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.references import CHAT_TEMPLATES, reference_kind
from ..errors import DistillError
from ..hub.model_files import ATTENTION
from .data import Source
from .models import Student, TeacherSpec
from .schema import Recipe

# Hyperparameters of a training and of its evaluation.
ALLOWED = {
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "optim", "optim_args"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_target_modules", "max_grad_norm"),
    *("gradient_accumulation_steps", "average_tokens_across_devices", "label_smoothing_factor"),
    *("bf16", "fp16", "bf16_full_eval", "fp16_full_eval", "tf32", "use_cpu", "use_cache", "use_liger_kernel"),
    *("activation_checkpointing", "activation_checkpointing_kwargs", "gradient_checkpointing"),
    *("gradient_checkpointing_kwargs", "liger_kernel_config", "neftune_noise_alpha", "torch_empty_cache_steps"),
    *("auto_find_batch_size", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
    *("include_num_input_tokens_seen", "log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"),
    *("eval_strategy", "eval_steps", "eval_delay", "prediction_loss_only", "eval_on_start", "eval_do_concat_batches"),
    *("eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics", "batch_eval_metrics"),
    *("save_only_model", "save_strategy", "save_steps", "save_on_each_node", "save_total_limit"),
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "ignore_data_skip"),
    "early_stopping_patience",
    *("full_determinism", "seed", "data_seed", "dataloader_drop_last", "dataloader_pin_memory"),
    *("dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_in_order"),
    *("remove_unused_columns", "train_sampling_strategy", "length_column_name", "run_name"),
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_timeout"),
    *("self_check", "max_consecutive_nonfinite_steps"),
    *("fsdp", "skip_memory_metrics", "do_train", "do_eval", "do_predict", "restore_callback_states_from_checkpoint"),
}
# Fields that are looked into, by a function below.
_INSPECTED = {"output_dir", "report_to", "deepspeed", "dataloader_num_workers", "fsdp_config", "accelerator_config"}
# Fields that name a place, an account, a backend or a file.
REFUSED = {
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("resume_from_checkpoint", "torch_compile", "torch_compile_backend", "torch_compile_mode", "debug"),
    *("enable_jit_checkpoint", "parallelism_config", "dataloader_multiprocessing_context", "label_names"),
    *("ddp_backend", "local_rank"),
}
KNOWN = ALLOWED | _INSPECTED | REFUSED

_DEEPSPEED = {
    *("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "gradient_clipping", "prescale_gradients"),
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print"),
    *(
        "wall_clock_breakdown",
        "communication_data_type",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
    ),
    *("activation_checkpointing", "gradient_predivide_factor", "data_types"),
}
_PLACE = re.compile(r"path|file|dir|folder|url|host", re.IGNORECASE)
_MODEL = re.compile(r"package:[A-Za-z_]\w*/[\w-][\w.-]*\.gguf")  # a dotted module would be imported to be found
_TEXT = re.compile(r"package:[\w.]+")
_OUTPUT = re.compile(r"(?:runs|caches)(?:/[A-Za-z0-9][\w.-]*)+")
_WORKERS = 64


def policy_violations(recipe: Recipe) -> list[str]:
    """What a recipe from the Hub says and may not, each with its place and what to do; nothing where all is harmless.

    Args:
        recipe: as it came, validated, before its user's `key=value`.
    """
    problems = [*_models(recipe), *_data(recipe)]
    problems += _train(recipe.train.model_dump(exclude_unset=True), "train")
    for number, stage in enumerate(recipe.stages, 1):
        problems += _train(stage.train, f"stages.{number}.train")
    return problems


def _models(recipe: Recipe) -> Iterator[str]:
    students = {"student": recipe.student} | {f"stages.{i}.student": s.student for i, s in enumerate(recipe.stages, 1)}
    teachers = {"teacher": recipe.teacher} if recipe.teacher else {f"teachers.{t.name}": t for t in recipe.teachers}
    sources = {f"{place}.source": spec.source for place, spec in teachers.items() if spec and spec.source}
    specs: dict[str, Any] = {**students, **teachers, **sources}
    for place, spec in specs.items():
        yield from _model(spec, place)
        if isinstance(spec, TeacherSpec):
            yield from _teacher(spec, place)


def _model(spec: Student | TeacherSpec, place: str) -> Iterator[str]:
    if spec.model is not None and (why := _no_public_name(spec.model, _MODEL)):
        yield f"{place}.model: {spec.model!r} {why}: give the id of a model on the Hub"
    if spec.attn_implementation not in (None, *ATTENTION):
        yield (
            f"{place}.attn_implementation: {spec.attn_implementation!r} would be downloaded and run: it may be one of "
            f"{', '.join(ATTENTION)}"
        )
    if isinstance(spec, Student) and spec.lora:
        modules = spec.lora.target_modules
        if any(not re.fullmatch(r"[\w.-]+", name) for name in ([modules] if isinstance(modules, str) else modules)):
            yield f"{place}.lora.target_modules: a pattern may take for ever to match: name modules, or all-linear"


def _teacher(spec: TeacherSpec, place: str) -> Iterator[str]:
    if (
        spec.path
        and not _OUTPUT.fullmatch(spec.path)
        and not (reference_kind(spec.path) == "address" and _is_address(spec.path))
    ):
        yield f"{place}.path: {spec.path!r} is a place on this machine: it may be caches/NAME or hf://datasets/..."
    if spec.deepspeed:
        yield from _deepspeed(spec.deepspeed, f"{place}.deepspeed")
    if isinstance(spec.device_map, dict) and "disk" in spec.device_map.values():
        yield f"{place}.device_map: it may not write to the disk"


def _no_public_name(name: str, packaged: re.Pattern[str]) -> str | None:
    """Why a model's or data set's name would not be looked up on the Hub, or in an installed package."""
    match reference_kind(name):
        case "package":
            return None if packaged.fullmatch(name) else "is no part of an installed package"
        case "address":
            return None if _is_address(name) else "is no address of a model or data set repository"
        case "path":
            return "is a folder on this machine" if Path(name).exists() else "is no id on the Hub"
        case "smoke":
            return "is a tiny random model"
    return None


def _is_address(text: str) -> bool:
    from ..hub import parse_uri

    try:
        return bool(parse_uri(text))
    except DistillError:
        return False


def _data(recipe: Recipe) -> Iterator[str]:
    if recipe.data.chat_template not in (None, *CHAT_TEMPLATES):
        yield (
            f"data.chat_template: {recipe.data.chat_template!r} is a file on this machine: name one of "
            f"{', '.join(CHAT_TEMPLATES)}"
        )
    sources: dict[str, Any] = {**recipe.data.sources, "eval": recipe.data.eval}
    for name, source in sources.items():
        place = f"data.{name}"
        if source.path and (why := _no_public_name(source.path, _TEXT)):
            yield (
                f"{place}.path: {source.path!r} {why}: give the id of a data set, or a .jsonl, .csv, .parquet, .arrow "
                "or .txt file of the recipe's own repository"
            )
        if source.name and not re.fullmatch(r"[\w.+-]+", source.name):
            yield f"{place}.name: {source.name!r} is no name of a configuration"
        if isinstance(source, Source) and not re.fullmatch(r"[\w\[\]:%+.-]+", source.split):
            yield f"{place}.split: {source.split!r} is no split"


def _train(train: dict[str, Any], place: str) -> Iterator[str]:
    for name in train:
        if name in REFUSED or name not in KNOWN:
            yield f"{place}.{name}: it is its user's to say; give it on the command line as {place}.{name}=..."
    if "output_dir" in train and not _OUTPUT.fullmatch(str(train["output_dir"])):
        yield (
            f"{place}.output_dir: {train['output_dir']!r} is not inside runs/: give {place}.output_dir=... on the "
            "command line for another place"
        )
    trackers = train.get("report_to") or []
    if {*([trackers] if isinstance(trackers, str) else trackers)} - {"none", "tensorboard"}:
        yield f"{place}.report_to: {trackers!r} would log into your accounts: give it on the command line"
    if isinstance(workers := train.get("dataloader_num_workers"), int) and workers > _WORKERS:
        yield f"{place}.dataloader_num_workers: {workers} processes; at most {_WORKERS}"
    for name in ("fsdp_config", "accelerator_config"):
        if isinstance(train.get(name), str):
            yield f"{place}.{name}: {train[name]!r} is a file on this machine: write its content"
        yield from (f"{place}.{name}.{key}: it names a place" for key in _keys(train.get(name)) if _PLACE.search(key))
    if train.get("deepspeed"):
        yield from _deepspeed(train["deepspeed"], f"{place}.deepspeed")


def _deepspeed(config: Any, place: str) -> Iterator[str]:
    if not isinstance(config, dict):
        yield f"{place}: {config!r} is no packaged config and no file of the recipe's repository"
        return
    for name in config.keys() - _DEEPSPEED:
        yield f"{place}.{name}: this section is not known to be harmless: leave it out"
    yield from (f"{place}.{key}: it names a place on this machine" for key in _keys(config) if _PLACE.search(key))
    if "nvme" in _texts(config):
        yield f"{place}: it may not offload to a disk: cpu, or none"


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _texts(value: Any) -> set[str]:
    if isinstance(value, dict):
        return {text for inner in value.values() for text in _texts(inner)}
    if isinstance(value, list):
        return {text for inner in value for text in _texts(inner)}
    return {value.lower()} if isinstance(value, str) else set()
