"""Prepares the run folder: checks which run it holds, locks it, and cleans up after a refused run."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from ..core import run_files
from ..core.files import write_atomic
from ..core.locks import LOCK_FILE, check_unlocked, lock_folder, remove_lock_file
from ..core.processes import run_on_main
from ..errors import DistillError
from ..recipe.load import validate
from ..recipe.safe_yaml import read_yaml
from ..recipe.schema import Recipe
from ..trainer.checkpoints import checkpoints_of, is_as_written
from .checkpoint_recipe import check_same_result, recorded_values, result_values
from .quantized_student import FULL_PRECISION

_LOGS = (run_files.METRICS, run_files.NONFINITE_STEPS)
_WRITTEN = (
    run_files.RECIPE,
    *_LOGS,
    run_files.RESULTS,
    run_files.PRUNING,
    "student",
    "control",
    FULL_PRECISION,
    "*-unquantized",
    "peer",
    "ema",
    "direct",
    "stage-*",
    "checkpoint-*",
)


@contextmanager
def run_folder(recipe: Recipe, resume: bool) -> Iterator[Path]:
    """Lock the run folder while the block runs, write the resolved recipe into it, and yield its path.

    Existing files are never removed or replaced: a folder that holds a run is refused, or resumed by the recipe that
    wrote it. A run that is refused before it has saved anything leaves no files behind.

    Args:
        recipe: The recipe, whose `train.output_dir` is the folder.
        resume: Whether to resume the run in the folder, if it holds one.

    Raises:
        DistillError: The folder holds a model, it holds a run and `resume` is false, or it holds a run of another
            recipe, another process writes to it, or it is not writable.
    """
    folder = Path(recipe.train.output_dir)
    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(_claimed(recipe, folder, resume)))
        yield folder


@contextmanager
def _claimed(recipe: Recipe, folder: Path, resume: bool) -> Iterator[None]:
    check_unlocked(folder)  # first, because the advice of _check is wrong while another run is active
    _check(recipe, folder, resume)  # before anything is created
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    unlocked = not (folder / LOCK_FILE).exists()
    with lock_folder(folder, "a run"):
        before = _run_files(folder)
        try:
            _check(recipe, folder, resume)  # another process may have written to it in the meantime
            _write_recipe(recipe, folder)
            yield
        except BaseException as error:
            if not before:
                _remove_refused(folder, created, isinstance(error, DistillError), unlocked)
            raise


def _check(recipe: Recipe, folder: Path, resume: bool) -> None:
    """Refuse a folder that holds a run of another recipe, or any run if `resume` is false."""
    existing = _run_files(folder)
    if existing and not resume:
        raise DistillError(
            f"{folder} holds a run already ({', '.join(existing[:3])}). Add --resume to continue it, or set "
            "train.output_dir to another folder. A run never removes or replaces the files of another run."
        )
    if not existing:
        _check_no_model(folder)
        return
    file = folder / run_files.RECIPE
    if file.is_file():
        check_same_result(_values_of(file), recipe, file)
    checkpoints = [path for name in ("", "control", FULL_PRECISION) for path in checkpoints_of(folder / name)]
    intact = [path for path in checkpoints if is_as_written(path, "trainer_state.json")]
    records = {path: values for path in intact if (values := recorded_values(path)) is not None}
    for path, values in records.items():
        if not values:
            raise DistillError(
                f"{path} was not written by a run of a recipe, so this recipe cannot resume from it. Move it out of "
                f"{folder}, or set train.output_dir to another folder."
            )
        check_same_result(values, recipe, path / "trainer_state.json")
    if not file.is_file() and not records:
        raise DistillError(
            f"{folder} holds {', '.join(existing[:3])} and no {run_files.RECIPE}, and none of its checkpoints records "
            f"which recipe wrote it, so it cannot be resumed. Restore the {run_files.RECIPE} of that run, or set "
            "another train.output_dir."
        )


def _check_no_model(folder: Path) -> None:
    """Refuse the folder of a model, such as the student that is trained: a run writes many files beside it."""
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            raise DistillError(
                f"train.output_dir: {folder} is the folder of a model (it has a {name}), and a run writes its "
                "checkpoints and results into a folder of its own. Set another folder."
            )


def _values_of(file: Path) -> dict:
    """Return the result values of the recipe in a run folder."""
    try:
        values = read_yaml(file.read_text(), str(file))
        if not isinstance(values, dict):
            raise DistillError("it is not a mapping")
        return result_values(validate(values, file.parent))
    except (DistillError, OSError, UnicodeDecodeError) as error:
        raise DistillError(
            f"{file} is damaged: {error}. Restore it; or remove it and resume with the recipe that wrote the run, "
            "which is then compared with the values that the checkpoints record."
        ) from error


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe, unless the folder has one already."""
    if (folder / run_files.RECIPE).is_file():
        return
    try:
        write_atomic(folder / run_files.RECIPE, yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False))
    except OSError as error:
        raise DistillError(
            f"train.output_dir: {folder} cannot be written to ({error.strerror}). Set another folder, or make "
            "this one writable."
        ) from error


def _run_files(folder: Path) -> list[str]:
    """Return the names of the files in a folder that runs write. All other files belong to the user."""
    return sorted(path.name for pattern in _WRITTEN for path in folder.glob(pattern))


def _remove_refused(folder: Path, created: list[Path], refused: bool, unlocked: bool) -> None:
    """Remove the files of this run if it wrote only its recipe (and, if it was refused, its first logs)."""
    removable = [run_files.RECIPE, *((*_LOGS, run_files.PRUNING) if refused else ())]
    if set(_run_files(folder)) - {*removable}:
        return
    for name in removable:
        (folder / name).unlink(missing_ok=True)
    if unlocked:
        remove_lock_file(folder)
    for path in created:
        with suppress(OSError):  # the folder is not empty
            path.rmdir()
