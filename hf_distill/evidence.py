"""What a run proved: `evidence.json` and `metrics.jsonl` of a run folder."""

import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .version import __version__

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


def write_whole(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    half = path.with_name(f"{path.name}.half")
    half.write_text(text)
    half.replace(path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_whole(path, json.dumps(values, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The values of a JSON file; empty if there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def measured(metrics: dict[str, float]) -> dict[str, float]:
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
        if state.is_world_process_zero and self.path.is_file():
            whole = [line for line in self.path.read_text().splitlines(keepends=True) if line[-1] == "\n"]
            others = [line for line in whole if json.loads(line)["run"] != self.run]
            write_whole(self.path, "".join([*others, *(self._line(log["step"], log) for log in state.log_history)]))

    def _line(self, step: int, logs: dict[str, float]) -> str:
        return json.dumps({"run": self.run, "step": step, **logs}) + "\n"

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Append one line."""
        if state.is_world_process_zero:
            with self.path.open("a") as f:
                f.write(self._line(state.global_step, logs or {}))
