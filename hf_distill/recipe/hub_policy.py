"""The policy for untrusted recipes from the Hub: which values are allowed.

Only values that are known to be harmless are allowed. Fields of TrainingArguments, sections of a DeepSpeed config and
attention implementations are listed here by name, so that a new one is refused until someone adds it to a list. The
user can set any value on the command line.
"""

import re
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path

from ..core.json_types import JSONObject
from ..core.references import CHAT_TEMPLATES, reference_kind
from ..core.server_urls import SERVER_KEYS
from ..errors import DistillError
from ..filters import RowFilter, Selection
from ..filters.contamination import Decontaminate, EvaluationTexts
from ..filters.selections import LOG_PROBABILITY, BestOfN
from ..filters.user_functions import FunctionFilter
from ..hub.model_files import ATTENTION
from .data import Eval, Source
from .models import Student, TeacherSpec
from .schema import Recipe

# Hyperparameters of training and evaluation.
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
    *("self_check", "max_consecutive_nonfinite_steps", "chunk_tokens"),
    *("fsdp", "skip_memory_metrics", "do_train", "do_eval", "do_predict", "restore_callback_states_from_checkpoint"),
}
# Fields whose values are checked by the functions below.
_INSPECTED = {"output_dir", "report_to", "deepspeed", "dataloader_num_workers", "fsdp_config", "accelerator_config"}
# Fields that name a path, an account, a backend or a file.
REFUSED = {
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("resume_from_checkpoint", "torch_compile", "torch_compile_backend", "torch_compile_mode"),
    *("compile_teacher", "debug"),
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
_PATH_KEY = re.compile(r"path|file|dir|folder|url|host", re.IGNORECASE)
_MODEL = re.compile(r"package:[A-Za-z_]\w*/[\w-][\w.-]*\.gguf")  # no dots: finding a dotted module imports its parent
_TEXT = re.compile(r"package:[\w.]+")
_OUTPUT = re.compile(r"(?:runs|caches)(?:/[A-Za-z0-9][\w.-]*)+")
_MAX_WORKERS = 64
_PLACEHOLDER_URL = "http://placeholder.invalid"


def policy_violations(recipe: Recipe) -> list[str]:
    """List the values of an untrusted recipe that are not allowed, with key and remedy; empty if all are allowed.

    Args:
        recipe: The validated recipe, before the overrides of the user.
    """
    problems = [*_models(recipe), *_data(recipe), *_generation(recipe)]
    problems += _train(recipe.train.model_dump(exclude_unset=True), "train")
    for number, stage in enumerate(recipe.stages, 1):
        problems += _train(stage.train, f"stages.{number}.train")
    return problems


def _models(recipe: Recipe) -> Iterator[str]:
    students = {"student": recipe.student} | {
        f"stages.{i}.student": stage.student for i, stage in enumerate(recipe.stages, 1)
    }
    teachers = (
        {"teacher": recipe.teacher}
        if recipe.teacher
        else {f"teachers.{teacher.name}": teacher for teacher in recipe.teachers}
    )
    sources = {f"{location}.source": spec.source for location, spec in teachers.items() if spec and spec.source}
    specs: dict[str, Student | TeacherSpec] = {**students, **teachers, **sources}
    for location, spec in specs.items():
        yield from _model(spec, location)
        if isinstance(spec, TeacherSpec):
            yield from _teacher(spec, location)


def _model(spec: Student | TeacherSpec, location: str) -> Iterator[str]:
    model = spec.loaded_model if isinstance(spec, TeacherSpec) else spec.model
    if model is not None and (why := _why_not_public(model, _MODEL)):
        yield f"{location}.model: {model!r} {why}; an untrusted recipe must give the id of a model on the Hub"
    if spec.attn_implementation not in (None, *ATTENTION):
        yield (
            f"{location}.attn_implementation: {spec.attn_implementation!r} would be downloaded and run; allowed are "
            f"{', '.join(ATTENTION)}"
        )
    if isinstance(spec, Student) and spec.lora:
        modules = spec.lora.target_modules
        if any(not re.fullmatch(r"[\w.-]+", name) for name in ([modules] if isinstance(modules, str) else modules)):
            yield (
                f"{location}.lora.target_modules: regular expressions are not allowed, because matching one "
                "can take unlimited time; give a list of module names, or all-linear"
            )


def with_placeholder_urls(values: JSONObject) -> JSONObject:
    """Return the values of an untrusted recipe with a URL for each remote teacher, so that they can be validated.

    The user names the servers on the command line.
    """
    values = deepcopy(values)
    several = values.get("teachers")
    for spec in [values.get("teacher"), *(several if isinstance(several, list) else ())]:
        if isinstance(spec, dict) and spec.get("kind") == "remote":
            spec.setdefault("url", _PLACEHOLDER_URL)
    return values


def _teacher(spec: TeacherSpec, location: str) -> Iterator[str]:
    if spec.tokenizer is not None and (why := _why_not_public(spec.tokenizer, _MODEL)):
        yield (
            f"{location}.tokenizer: {spec.tokenizer!r} {why}; an untrusted recipe must give the id of a model on the "
            "Hub"
        )
    for name in SERVER_KEYS:
        if getattr(spec, name) not in (None, _PLACEHOLDER_URL):
            yield (
                f"{location}.{name}: an untrusted recipe may not name a server or a key, because the data is sent to "
                f"the server; pass {location}.{name}=... on the command line"
            )
    if (
        spec.path
        and not _OUTPUT.fullmatch(spec.path)
        and not (reference_kind(spec.path) == "address" and _is_address(spec.path))
    ):
        yield f"{location}.path: {spec.path!r} is a path on this machine; allowed are caches/NAME and hf://datasets/..."
    if spec.deepspeed:
        yield from _deepspeed(spec.deepspeed, f"{location}.deepspeed")
    if isinstance(spec.device_map, dict) and "disk" in spec.device_map.values():
        yield f"{location}.device_map: offloading to disk is not allowed in an untrusted recipe"


def _generation(recipe: Recipe) -> Iterator[str]:
    if recipe.generate is None:
        return
    yield from filter_violations(recipe.generate.filters, recipe.generate.select)
    if recipe.generate.output_dir and not _OUTPUT.fullmatch(recipe.generate.output_dir):
        yield (
            f"generate.output_dir: {recipe.generate.output_dir!r} is not inside runs/ or caches/; for another folder, "
            "pass generate.output_dir=... on the command line"
        )
    for name in SERVER_KEYS:
        if getattr(recipe.generate, name) is not None:
            yield (
                f"generate.{name}: an untrusted recipe may not name a server or a key, because the prompts are sent to "
                f"the server; pass generate.{name}=... on the command line"
            )


def _why_not_public(name: str, packaged: re.Pattern[str]) -> str | None:
    """Return why a name is neither on the Hub nor in an installed package; None if it is on one of them."""
    match reference_kind(name):
        case "package":
            return None if packaged.fullmatch(name) else "is not a file in an installed package"
        case "address":
            return None if _is_address(name) else "is not the address of a model or dataset repository"
        case "path":
            return "is a path on this machine" if Path(name).exists() else "is not an id on the Hub"
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
            f"data.chat_template: {recipe.data.chat_template!r} is a file on this machine; allowed are "
            f"{', '.join(CHAT_TEMPLATES)}"
        )
    sources: dict[str, Source | Eval] = {**recipe.data.sources, "eval": recipe.data.eval}
    for name, source in sources.items():
        yield from _data_set(source, f"data.{name}")


def _data_set(source: Source | Eval | EvaluationTexts, location: str) -> Iterator[str]:
    if source.path and (why := _why_not_public(source.path, _TEXT)):
        yield (
            f"{location}.path: {source.path!r} {why}; an untrusted recipe must give the id of a dataset, or a "
            ".jsonl, .csv, .parquet, .arrow or .txt file in the repository of the recipe"
        )
    if source.name and not re.fullmatch(r"[\w.+-]+", source.name):
        yield f"{location}.name: {source.name!r} is not the name of a dataset configuration"
    if not re.fullmatch(r"[\w\[\]:%+.-]+", source.split):
        yield f"{location}.split: {source.split!r} is not the name of a split"


def filter_violations(
    filters: Sequence[RowFilter], select: Selection | None, location: str = "generate"
) -> Iterator[str]:
    """Yield the values of filters and of a selection that an untrusted recipe may not have.

    Args:
        filters: The filters.
        select: The selection.
        location: The section that they are in.
    """
    steps = {f"{location}.filters.{i}": step for i, step in enumerate(filters)} | {f"{location}.select": select}
    for key, step in steps.items():
        functions = {"function": step.function} if isinstance(step, FunctionFilter) else {}
        if isinstance(step, BestOfN) and step.score != LOG_PROBABILITY:
            functions["score"] = step.score
        yield from (
            f"{key}.{option}: {function!r} is code of this machine that would be run; an untrusted recipe may not name "
            "functions. Remove it, or copy the recipe and read the function that it names"
            for option, function in functions.items()
        )
        for i, data in enumerate(step.data if isinstance(step, Decontaminate) else ()):
            yield from _data_set(data, f"{key}.data.{i}")


def _train(train: dict[str, object], location: str) -> Iterator[str]:
    for name in train:
        if name in REFUSED or name not in KNOWN:
            yield (
                f"{location}.{name}: not allowed in a recipe from the Hub; pass {location}.{name}=... on the "
                "command line"
            )
    if "output_dir" in train and not _OUTPUT.fullmatch(str(train["output_dir"])):
        yield (
            f"{location}.output_dir: {train['output_dir']!r} is not inside runs/; for another folder, pass "
            f"{location}.output_dir=... on the command line"
        )
    trackers = train.get("report_to") or []
    if {*(trackers if isinstance(trackers, list) else [trackers])} - {"none", "tensorboard"}:
        yield (
            f"{location}.report_to: {trackers!r} would log to your accounts; to allow that, pass "
            f"{location}.report_to=... on the command line"
        )
    if isinstance(workers := train.get("dataloader_num_workers"), int) and workers > _MAX_WORKERS:
        yield f"{location}.dataloader_num_workers: {workers} processes are not allowed; at most {_MAX_WORKERS} are"
    for name in ("fsdp_config", "accelerator_config"):
        if isinstance(train.get(name), str):
            yield f"{location}.{name}: {train[name]!r} is a file on this machine; write its content into the recipe"
        yield from (
            f"{location}.{name}.{key}: keys that name a path are not allowed"
            for key in _keys(train.get(name))
            if _PATH_KEY.search(key)
        )
    if train.get("deepspeed"):
        yield from _deepspeed(train["deepspeed"], f"{location}.deepspeed")


def _deepspeed(config: object, location: str) -> Iterator[str]:
    if not isinstance(config, dict):
        yield f"{location}: {config!r} is neither a packaged config nor a file in the repository of the recipe"
        return
    for name in config.keys() - _DEEPSPEED:
        yield f"{location}.{name}: this section is not allowed in an untrusted recipe; remove it"
    yield from (
        f"{location}.{key}: keys that name a path are not allowed" for key in _keys(config) if _PATH_KEY.search(key)
    )
    if "nvme" in _texts(config):
        yield f"{location}: offloading to disk is not allowed; use the device cpu, or none"


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)


def _texts(value: object) -> set[str]:
    if isinstance(value, dict):
        return {text for inner in value.values() for text in _texts(inner)}
    if isinstance(value, list):
        return {text for inner in value for text in _texts(inner)}
    return {value.lower()} if isinstance(value, str) else set()
