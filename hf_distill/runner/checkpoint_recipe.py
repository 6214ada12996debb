"""A checkpoint belongs to the recipe that wrote it: which values of a recipe change the result."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..core.processes import is_alone
from ..errors import DistillError
from ..recipe.schema import Recipe

# Keys of a recipe that describe where it came from.
_ORIGIN = {"origin", "requires", "extends"}
# Keys of `train` that change what is logged, saved, published or how fast rows are read, and no weight or metric.
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
_EVALUATION_MEMORY = {"per_device_eval_batch_size", "eval_accumulation_steps"}
_PROCESSES = "number of processes"
_OTHER_PROCESSES = (
    "\nA Trainer of transformers would resume with another number of processes. But even where "
    "train.per_device_train_batch_size and train.gradient_accumulation_steps keep the global batch as it was, the rows "
    "are divided otherwise, and each process has saved a random state of its own. Start as many processes as before."
)
_STEPS = {"train.max_steps", "train.num_train_epochs"}


def result_values(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe that change the weights or metrics of a run, by dotted key.

    When and where checkpoints are saved changes the result where the best of them is exported; the number of workers
    changes it where a stream is divided among them.
    """
    train = recipe.train
    free = _LOGGING | _EVALUATION_MEMORY
    if not (train.load_best_model_at_end or train.early_stopping_patience):
        free |= _SAVING
    else:
        free |= _SAVING - {"save_strategy", "save_steps", "save_total_limit"}
    if not any(source.streaming for source in recipe.data.sources.values()):
        free |= _READING
    values = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    flat = _flat({key: value for key, value in values.items() if key not in _ORIGIN})
    return {key: value for key, value in flat.items() if key.removeprefix("train.") not in free}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys; empty ones and lists are values."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def launch_values() -> dict[str, Any]:
    """What changes the result and is no value of a recipe: how many processes share each step's batch."""
    return {_PROCESSES: 1 if is_alone() else torch.distributed.get_world_size()}


def check_same_result(before: dict[str, Any], recipe: Recipe, source: Path) -> None:
    """Refuse to resume a run with values that change its result.

    Args:
        before: result values of the recipe that wrote the run; of a checkpoint also the `launch_values` of then.
        recipe: the one that is to go on with it.
        source: the file that `before` was read from, for the message.

    Raises:
        DistillError: lists every value that differs, old -> new.
    """
    now = result_values(recipe) | {key: value for key, value in launch_values().items() if key in before}
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if not changed:
        return
    lines = "".join(f"\n  {key}: {_shown(before, key)} -> {_shown(now, key)}" for key in changed)
    longer = (
        "\nThe learning rate, the schedules of losses and the order of rows depend on the number of steps, so it "
        f"cannot change while a run lasts. To train longer, start a new run from its student: student.model="
        f"{Path(recipe.train.output_dir) / 'student'}, with another train.output_dir."
    )
    raise DistillError(
        f"{recipe.train.output_dir} holds a run of another recipe. These values change the result, and differ from "
        f"{source}:{lines}\nResume with the values of that run, or set train.output_dir to another folder; how often "
        "is logged or saved, and the number of data workers, may change."
        + (longer if _STEPS.intersection(changed) else "")
        + (_OTHER_PROCESSES if _PROCESSES in changed else "")
    )


def _shown(values: dict[str, Any], key: str) -> str:
    if key not in values:
        return "(not given)"
    text = json.dumps(values[key], ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


class RecipeRecord(TrainerCallback, ExportableState):
    """Records in each checkpoint's `trainer_state.json` the values of the recipe that wrote it."""

    def __init__(self, values: dict[str, Any]):
        self.values = values

    def state(self) -> dict[str, Any]:
        """What a Trainer saves of a callback."""
        return {"args": {"values": self.values}, "attributes": {}}


def recorded_values(checkpoint: Path) -> dict[str, Any] | None:
    """The result values that a checkpoint records; empty if no recipe wrote it, None if its state cannot be read."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        values = state["stateful_callbacks"].get(RecipeRecord.__name__, {"args": {"values": {}}})["args"]["values"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return values if isinstance(values, dict) else None
