"""Binds checkpoints to the run that wrote them: the values of the recipe that change the result, and what was read."""

import json
from pathlib import Path

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..cache.fingerprints import weights_fingerprint
from ..core.files import checksum_of
from ..core.json_types import JSONObject
from ..core.processes import is_alone
from ..core.results import DataFacts
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..teachers import CachedTeacher, FrozenTeacher, RemoteTeacher, Teacher
from ..teachers.group import TeacherGroup

# Keys of a recipe that describe its origin.
_ORIGIN = {"origin", "requires", "extends"}
# Keys of `train` that affect logging, saving, publishing and reading speed, but no weight and no metric.
_LOGGING = {
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "logging_nan_inf_filter"),
    *("log_level", "log_level_replica", "disable_tqdm", "report_to", "run_name", "project", "trackio_space_id"),
    *("trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen", "debug", "self_check"),
    *("skip_memory_metrics", "torch_empty_cache_steps", "ddp_timeout"),
}
_SAVING = {
    *("output_dir", "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint"),
    *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    *("hub_revision", "restore_callback_states_from_checkpoint", "resume_from_checkpoint"),
}
_READING = {
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context"),
}
# Keys of `generate` that do not change the completions, or that the identity of the data set covers.
_GENERATION = {"output_dir", "batching", "batch_size"}
_SERVERS = {"url", "timeout", "retry_seconds", "concurrency", "prefetch", "api_key_env"}
_EVALUATION_MEMORY = {"per_device_eval_batch_size", "eval_accumulation_steps"}
_PROCESSES = "number of processes"
_OTHER_PROCESSES = (
    "\nThe number of processes changes the result even if train.per_device_train_batch_size and "
    "train.gradient_accumulation_steps keep the global batch size the same: the rows are distributed differently, and "
    "each process has saved its own random state. Start as many processes as before."
)
_CONTENT = "content of "  # prefix of the keys of `content_values`
_STEPS = {"train.max_steps", "train.num_train_epochs"}


def result_values(recipe: Recipe) -> JSONObject:
    """Return the values of a recipe that change the weights or metrics of a run, by dotted key.

    The save options change the result if the best checkpoint is exported. The number of data workers changes it if a
    streamed source is divided among them.
    """
    train = recipe.train
    ignored = _LOGGING | _EVALUATION_MEMORY
    if not (train.load_best_model_at_end or train.early_stopping_patience):
        ignored |= _SAVING
    else:
        ignored |= _SAVING - {"save_strategy", "save_steps", "save_total_limit"}
    if not any(source.streaming for source in recipe.data.sources.values()):
        ignored |= _READING
    values = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    for teacher in [values.get("teacher"), *values.get("teachers", ())]:
        for name in _SERVERS & {*(teacher or ())}:  # another server of the same model gives the same result
            del teacher[name]
    generation = values.pop("generate", None) or {}
    if recipe.data.generated:  # otherwise the run does not read it
        compared_values = {key: value for key, value in generation.items() if key not in _SERVERS | _GENERATION}
        values["generate"] = compared_values
    flat = _flatten({key: value for key, value in values.items() if key not in _ORIGIN})
    return {key: value for key, value in flat.items() if key.removeprefix("train.") not in ignored}


def _flatten(values: JSONObject, prefix: str = "") -> JSONObject:
    """Flatten nested mappings to dotted keys. Empty mappings and lists are values."""
    flat: JSONObject = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def launch_values() -> JSONObject:
    """Return what changes the result but is not a value of the recipe: the number of processes."""
    return {_PROCESSES: 1 if is_alone() else torch.distributed.get_world_size()}


def content_values(data: DataFacts, teacher: Teacher | None, adapted: nn.Module | None = None) -> dict[str, str]:
    """Return checksums of what a run reads and no checkpoint holds: rows, teachers, the model below adapters.

    Args:
        data: `PreparedData.facts`.
        teacher: The prepared teacher. All processes must call this if it is sharded.
        adapted: The student if it has adapters; None for another student, whose weights are in each checkpoint.
    """
    checksums = {"training rows": data.get("train_fingerprint"), "held-out rows": data.get("eval_fingerprint")}
    teachers = teacher.teachers if isinstance(teacher, TeacherGroup) else {"": teacher}
    for name, each in teachers.items():
        one = None if each is None else each.unwrapped
        if isinstance(one, FrozenTeacher):
            checksums[f"weights of the teacher {name}".strip()] = weights_fingerprint(one.model)
        elif isinstance(one, RemoteTeacher):
            summary = one.summary()
            checksums[f"model on the server of the teacher {name}".strip()] = summary.get("model")
            checksums[f"weights of the teacher {name}".strip()] = summary.get("weights")
        elif isinstance(one, CachedTeacher):
            digests = {entry["file"]: entry["sha256"] for entry in one.manifest.files}
            checksums[f"cache of the teacher {name}".strip()] = checksum_of(digests)
    if adapted is not None:
        checksums["weights of the student below its adapters"] = weights_fingerprint(adapted, only_frozen=True)
    return {_CONTENT + key: value for key, value in checksums.items() if value}


def check_same_content(checkpoint: Path, now: dict[str, str]) -> None:
    """Refuse to resume from a checkpoint of a run that read other rows or another teacher under the same names.

    Args:
        checkpoint: The checkpoint to resume from.
        now: `content_values` of this run.

    Raises:
        DistillError: Some contents differ.
    """
    before = recorded_values(checkpoint) or {}
    if changed := [key.removeprefix(_CONTENT) for key in now if before.get(key, now[key]) != now[key]]:
        raise DistillError(
            f"{checkpoint} cannot be resumed, because the {' and the '.join(changed)} changed after the checkpoint was "
            "written, while the names in the recipe are the same. The result would belong to neither run. Restore the "
            "files, or start a new run with another train.output_dir."
        )


def check_same_result(before: JSONObject, recipe: Recipe, source: Path) -> None:
    """Refuse to resume a run with values that change its result.

    Args:
        before: Result values of the recipe that wrote the run; for a checkpoint also its `launch_values`.
        recipe: The recipe that resumes the run.
        source: The file that `before` was read from, for the message.

    Raises:
        DistillError: Some values differ. The message lists each of them as old -> new.
    """
    before = {key: value for key, value in before.items() if not key.startswith(_CONTENT)}
    now = result_values(recipe) | {key: value for key, value in launch_values().items() if key in before}
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if not changed:
        return
    lines = "".join(f"\n  {key}: {_format_value(before, key)} -> {_format_value(now, key)}" for key in changed)
    longer = (
        "\nThe number of steps cannot change during a run, because the learning rate, the loss schedules and the order "
        "of rows depend on it. To train longer, start a new run from its student: set student.model="
        f"{Path(recipe.train.output_dir) / 'student'} and another train.output_dir."
    )
    raise DistillError(
        f"{recipe.train.output_dir} holds a run of another recipe. These values change the result and differ from "
        f"{source}:{lines}\nResume with the values of that run, or set train.output_dir to another folder. Only the "
        "options of logging and saving and the number of data workers may change."
        + (longer if _STEPS.intersection(changed) else "")
        + (_OTHER_PROCESSES if _PROCESSES in changed else "")
    )


def _format_value(values: JSONObject, key: str) -> str:
    if key not in values:
        return "(not set)"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class RecipeRecord(TrainerCallback, ExportableState):
    """Records the result values of the recipe in the `trainer_state.json` of each checkpoint.

    Args:
        values: The values to record.
    """

    def __init__(self, values: JSONObject):
        self.values = values

    def state(self) -> dict[str, dict]:
        """Return the state that the Trainer saves for this callback."""
        return {"args": {"values": self.values}, "attributes": {}}


def recorded_values(checkpoint: Path) -> JSONObject | None:
    """Return the result values of a checkpoint; empty if no recipe wrote it, None if its state cannot be read."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        values = state["stateful_callbacks"].get(RecipeRecord.__name__, {"args": {"values": {}}})["args"]["values"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return values if isinstance(values, dict) else None
