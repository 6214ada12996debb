"""Reads run folders for analyses, each of which adds a JSON file to the folder."""

from dataclasses import dataclass
from pathlib import Path

from ..core import run_files
from ..core.io import read_logs, read_results
from ..core.references import path_exists
from ..core.results import Metrics, Results
from ..errors import DistillError
from ..recipe.generation import Generation
from ..recipe.load import load_recipe
from ..recipe.schema import Recipe

# File or folder in a run folder -> the command that writes it.
WRITTEN_BY = {
    run_files.RECIPE: "hf-distill run RECIPE",
    run_files.RESULTS: "hf-distill run RECIPE",
    run_files.METRICS: "hf-distill run RECIPE",
    "student": "hf-distill run RECIPE",
    "control": "hf-distill run RECIPE control=sft",
    "full_precision": "hf-distill run RECIPE control=full_precision",
    run_files.INSPECTION: "hf-distill inspect RUN",
    run_files.DIAGNOSIS: "hf-distill diagnose RUN",
    run_files.RETENTION: "hf-distill retention RUN",
    run_files.DRAFT: "hf-distill draft RUN",
    run_files.TEMPERATURE_SEARCH: "hf-distill temperature RECIPE",
    run_files.SAMPLES: "hf-distill report RUN",
    run_files.CURVE: "hf-distill curve RUN",
    run_files.REPORT: "hf-distill report RUN",
}


@dataclass(frozen=True)
class Run:
    """A run folder and its recipe.

    Attributes:
        folder: The run folder.
        recipe: The resolved recipe of the run.
    """

    folder: Path
    recipe: Recipe

    def path(self, name: str) -> Path:
        """Return the path of a file of the run, or of the folder of a trained model.

        Raises:
            DistillError: It does not exist. The message names the command that writes it.
        """
        path = self.folder / name
        if not self.has(name):
            command = WRITTEN_BY.get(name, "hf-distill run RECIPE").replace("RUN", str(self.folder))
            raise DistillError(f"{path} is missing: `{command}` writes it.")
        return path

    def has(self, name: str) -> bool:
        """Whether a file or a trained model exists. Before the end of its training, a model has checkpoints only."""
        path = self.folder / name
        return path.is_file() or any((path / f"{kind}config.json").is_file() for kind in ("", "adapter_"))

    @property
    def results(self) -> Results:
        """The content of results.json: metrics, models and environment of the run."""
        return read_results(self.path(run_files.RESULTS))

    def logs(self, run: str = "student") -> list[Metrics]:
        """Return the logged values of one training (student, control or full_precision), in order; see metrics.jsonl.

        Raises:
            DistillError: The file is damaged, or lacks lines that it had at the end of the run.
        """
        file = self.path(run_files.METRICS)
        logs = [{k: v for k, v in log.items() if k != "run"} for log in read_logs(file) if log["run"] == run]
        recorded = read_results(self.folder / run_files.RESULTS).get("log_lines", {}).get(run, 0)
        if len(logs) < recorded:
            raise DistillError(
                f"{file} was truncated: it holds {len(logs)} lines of {run}, and had {recorded}. Restore it from a "
                f"copy; or remove results.json and run `hf-distill run {self.folder / run_files.RECIPE} --resume`, "
                "which writes both again from the last checkpoint."
            )
        return logs


def open_run(folder: str | Path) -> Run:
    """Open a run folder.

    Returns:
        the run and its recipe.

    Raises:
        DistillError: The folder does not exist, or is not a run folder because it has no recipe.yaml.
    """
    folder = Path(folder)
    if not path_exists(folder) or not folder.is_dir():
        raise DistillError(f"There is no folder {folder}. Give the folder of a run, which `hf-distill run` writes.")
    if not (folder / run_files.RECIPE).is_file():
        raise DistillError(
            f"{folder / run_files.RECIPE} is missing, so {folder} is not the folder of a run. "
            f"`{WRITTEN_BY[run_files.RECIPE]}` writes it."
        )
    return Run(folder, _with_moved_data(load_recipe(str(folder / run_files.RECIPE)), folder))


def _with_moved_data(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe of a run with the generated data in its folder, if the folder was moved after the run."""
    moved_data = folder / run_files.GENERATED
    if (
        recipe.data.generated
        and moved_data.is_dir()
        and not any(Path(recipe.generated_folder(name)).is_dir() for name in recipe.data.generated)
    ):
        options = recipe.generate or Generation.model_validate({})
        return recipe.model_copy(update={"generate": options.model_copy(update={"output_dir": str(moved_data)})})
    return recipe
