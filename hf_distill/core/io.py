"""What a run proved: `results.json` and `metrics.jsonl` of a run folder."""

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import DistillError
from ..version import __version__

logger = logging.get_logger(__name__)
_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "safetensors")


def environment(device: str) -> dict[str, Any]:
    """Versions and machine, for whoever reads the numbers later."""
    return {
        "hf_distill": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "device": device,
    }


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    half = path.with_name(f"{path.name}.half")
    half.write_text(text)
    half.replace(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_atomic(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file; empty if there is none.

    Raises:
        DistillError: it cannot be read, or holds no mapping.
    """
    if not path.exists():
        return {}
    with damage_reported(path):
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__} instead of a mapping")
    return values


def read_results(path: Path) -> dict[str, Any]:
    """The values of a run's `results.json`; empty if there is none.

    Raises:
        DistillError: see `read_json`; its metrics are not numbers by name.
    """
    values = read_json(path)
    with damage_reported(path):
        _Results.model_validate(values)
    return values


class _Results(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)
    status: str = ""
    models: dict[str, dict[str, float | None]] = {}
    log_lines: dict[str, int] = {}
    steps: dict[str, int] = {}
    chain: list[dict[str, Any]] = []
    environment: dict[str, Any] = {}
    data: dict[str, Any] = {}
    student: dict[str, Any] = {}
    teacher: dict[str, Any] = {}
    provenance: dict[str, Any] = {}


@contextmanager
def damage_reported(path: Path) -> Iterator[None]:
    """Errors of the block, which reads the values of a file, become a DistillError that names the file.

    A DistillError of the block stays what it is.
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
    """The lines of a `metrics.jsonl`, in order.

    Raises:
        DistillError: names the first line that was cut off or cannot be read.
    """
    with damage_reported(path):
        lines = path.read_text().splitlines()
    found = []
    for number, line in enumerate(lines, 1):
        with damage_reported(Path(f"{path}, line {number},")):
            found.append(_log(line))
    return found


def _log(line: str) -> dict[str, Any]:
    values = json.loads(line)
    if not isinstance(values, dict) or not isinstance(values["run"], str) or not isinstance(values["step"], int):
        raise TypeError("it is not a mapping with `run` and `step`")
    return values


def count_logs(path: Path) -> dict[str, int]:
    """For each training, the number of its lines in a `metrics.jsonl`, by which a file that lost some is recognised."""
    return dict(Counter(log["run"] for log in read_logs(path))) if path.exists() else {}


def held_out_metrics(metrics: dict[str, float]) -> dict[str, float]:
    """Held-out metrics without the `eval_` prefix and the timing."""
    timing = ("runtime", "per_second", "preparation_time")
    found = {k.removeprefix("eval_"): v for k, v in metrics.items() if k.startswith("eval_")}
    return {k: v for k, v in found.items() if not k.endswith(timing)}


class MetricsFile(TrainerCallback):
    """Appends every log of a trainer to a file of JSON lines, `{"run": ..., "step": ..., ...}`.

    Where training begins, its lines are those of the checkpoint that it goes on from, and others stay.
    """

    def __init__(self, path: Path, run: str):
        self.path, self.run = path, run

    def on_train_begin(self, args, state, control, **kwargs):
        """Take back what came after the checkpoint, and a line that was cut off."""
        if state.is_world_process_zero and self.path.exists():
            with damage_reported(self.path):
                lines = self.path.read_text(errors="replace").splitlines(keepends=True)
            others = [line for number, line in enumerate(lines, 1) if self._is_of_another(line, number)]
            write_atomic(self.path, "".join([*others, *(self._line(log["step"], log) for log in state.log_history)]))

    def _is_of_another(self, line: str, number: int) -> bool:
        try:
            return _log(line)["run"] != self.run and line[-1] == "\n"
        except (ValueError, TypeError, LookupError, RecursionError):
            logger.warning(f"{self.path}, line {number}, is damaged and left out.")
            return False

    def _line(self, step: int, logs: dict[str, float]) -> str:
        return json.dumps({"run": self.run, "step": step, **logs}) + "\n"

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line."""
        if state.is_world_process_zero:
            with self.path.open("a") as f:
                f.write(self._line(state.global_step, logs or {}))
