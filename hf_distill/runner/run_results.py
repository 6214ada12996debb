"""A run's folder, as a run left it; read by every analysis, each of which leaves a JSON file of its own in it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.io import read_logs, read_results
from ..core.references import path_exists
from ..errors import DistillError
from ..recipe.load import load_recipe
from ..recipe.schema import Recipe

# What an analysis leaves in the folder -> the command that writes it.
WRITTEN_BY = {
    "recipe.yaml": "hf-distill run RECIPE",
    "results.json": "hf-distill run RECIPE",
    "metrics.jsonl": "hf-distill run RECIPE",
    "student": "hf-distill run RECIPE",
    "control": "hf-distill run RECIPE control=sft",
    "inspection.json": "hf-distill inspect RUN",
    "diagnosis.json": "hf-distill diagnose RUN",
    "retention.json": "hf-distill retention RUN",
    "temperature.json": "hf-distill temperature RECIPE",
    "samples.json": "hf-distill report RUN",
    "curve.json": "hf-distill curve RUN",
    "report.html": "hf-distill report RUN",
}


@dataclass(frozen=True)
class Run:
    """A run's folder with its recipe.

    folder: of the run
    recipe: as resolved when it ran
    """

    folder: Path
    recipe: Recipe

    def path(self, name: str) -> Path:
        """A file of the run, or the folder of a model that was trained.

        Raises:
            DistillError: it is not there; says which command writes it.
        """
        path = self.folder / name
        if not self.has(name):
            command = WRITTEN_BY.get(name, "hf-distill run RECIPE").replace("RUN", str(self.folder))
            raise DistillError(f"{path} is missing: `{command}` writes it.")
        return path

    def has(self, name: str) -> bool:
        """Whether a file is there, or a trained model: while it is trained its folder has checkpoints at most."""
        path = self.folder / name
        return path.is_file() or any((path / f"{kind}config.json").is_file() for kind in ("", "adapter_"))

    @property
    def results(self) -> dict[str, Any]:
        """What the run proved, from results.json."""
        return read_results(self.path("results.json"))

    def logs(self, run: str = "student") -> list[dict[str, Any]]:
        """Lines of metrics.jsonl of one of its trainings ("student", "control"), in order.

        Raises:
            DistillError: it is damaged, or lacks lines that it had when the run was over.
        """
        file = self.path("metrics.jsonl")
        logs = [log for log in read_logs(file) if log["run"] == run]
        recorded = read_results(self.folder / "results.json").get("log_lines", {}).get(run, 0)
        if len(logs) < recorded:
            raise DistillError(
                f"{file} was truncated: it holds {len(logs)} lines of {run}, and had {recorded}. Restore it from a "
                f"copy; or remove results.json, and `hf-distill run {self.folder / 'recipe.yaml'} --resume` writes "
                "both again from the last checkpoint."
            )
        return logs


def open_run(folder: str | Path) -> Run:
    """A run's folder.

    Raises:
        DistillError: it is no run's: its recipe.yaml is missing.
    """
    folder = Path(folder)
    if not path_exists(folder) or not folder.is_dir():
        raise DistillError(f"There is no folder {folder}: give the folder of a run, as `hf-distill run` left it.")
    if not (folder / "recipe.yaml").is_file():
        raise DistillError(
            f"{folder / 'recipe.yaml'} is missing, so {folder} is not the folder of a run: "
            f"`{WRITTEN_BY['recipe.yaml']}` writes it."
        )
    return Run(folder, load_recipe(str(folder / "recipe.yaml")))
