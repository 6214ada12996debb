"""Reads and writes the result files of a run folder: JSON, `results.json` and `metrics.jsonl`."""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ConfigDict
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ..errors import DistillError
from ..version import __version__
from .files import write_atomic
from .results import Results

logger = logging.get_logger(__name__)
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


def environment(device: str) -> dict[str, str | int | None]:
    """Return the versions of packages and the machine that results were measured with.

    Args:
        device: name of the device.
    """
    return {
        "hf_distill": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": device,
    }


def write_json(path: Path, values: Mapping[str, object]) -> None:
    """Write a JSON file atomically."""
    write_atomic(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Return the values of a JSON file; an empty dict if it does not exist.

    Raises:
        DistillError: the file cannot be read, or holds no mapping.
    """
    if not path.exists():
        return {}
    with damage_reported(path):
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__} instead of a mapping")
    return values


def read_results(path: Path) -> Results:
    """Return the values of a run's `results.json`; an empty dict if it does not exist.

    Raises:
        DistillError: the file cannot be read, or a field has a wrong type.
    """
    values = read_json(path)
    with damage_reported(path):
        _Results.model_validate(values)
    return cast(Results, values)


class _Results(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    status: str = ""
    models: dict[str, dict[str, float | None]] = {}
    log_lines: dict[str, int] = {}
    steps: dict[str, int] = {}
    chain: list[dict[str, object]] = []
    environment: dict[str, object] = {}
    data: dict[str, object] = {}
    student: dict[str, object] = {}
    teacher: dict[str, object] = {}
    provenance: dict[str, object] = {}


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Turn errors of a block that reads a file into a DistillError that names the file.

    A DistillError of the block is raised unchanged.

    Args:
        path: the file, for the error message.
    """
    try:
        yield
    except DistillError:
        raise
    except (OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        details = str(error).partition("\n")[0]
        raise DistillError(
            f"{path} is damaged ({type(error).__name__}: {details}). "
            "Restore it from a copy, or remove it and let the command that wrote it write it again."
        ) from error


def read_logs(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a `metrics.jsonl`, in order.

    Raises:
        DistillError: a line is truncated or cannot be read; the message names the first one.
    """
    with damage_reported(path):
        lines = path.read_text().splitlines()
    logs = []
    for number, line in enumerate(lines, 1):
        with damage_reported(Path(f"{path}, line {number},")):
            logs.append(_log(line))
    return logs


def _log(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values["run"], str) or not isinstance(values["step"], int):
        raise TypeError("it is not a mapping with `run` and `step`")
    return values


def count_logs(path: Path) -> dict[str, int]:
    """Return the number of lines of each training in a `metrics.jsonl`; fewer lines later show that some were lost."""
    return dict(Counter(log["run"] for log in read_logs(path))) if path.exists() else {}


def held_out_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Return the metrics of an evaluation, without the prefix `eval_` and without the timing."""
    timing = ("runtime", "per_second", "preparation_time")
    values = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_")}
    return {k: v for k, v in values.items() if not k.endswith(timing)}


class MetricsFile(TrainerCallback):
    """Appends each log of a trainer to a file of JSON lines, `{"run": ..., "step": ..., ...}`.

    At the beginning of training, the lines of this training are replaced by those of the checkpoint that it resumes
    from. Lines of other trainings stay.

    Args:
        path: the file.
        run: name of the training.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Remove the lines after the checkpoint, and a truncated line."""
        if state.is_world_process_zero and self.path.exists():
            with damage_reported(self.path):
                lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            others = [line for number, line in enumerate(lines, 1) if self._is_of_another(line, number)]
            write_atomic(self.path, "".join([*others, *(self._line(log["step"], log) for log in state.log_history)]))

    def _is_of_another(self, line: str, number: int) -> bool:
        try:
            return _log(line)["run"] != self.run and line[-1] == "\n"
        except (ValueError, TypeError, LookupError, RecursionError):
            logger.warning(f"{self.path}, line {number}, is damaged: it is removed from the file.")
            return False

    def _line(self, step: float, logs: dict[str, float]) -> str:
        return json.dumps({"run": self.run, "step": step, **logs}) + "\n"

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            with self.path.open("a") as f:
                f.write(self._line(state.global_step, logs or {}))
