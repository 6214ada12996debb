"""A run's folder: which run it holds, who writes to it, and what is left of a run that was refused."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import yaml

from ..core.io import write_atomic
from ..core.locks import LOCK_FILE, check_unlocked, lock_folder, remove_lock_file
from ..core.processes import run_on_main
from ..errors import DistillError
from ..recipe.load import validate
from ..recipe.safe_yaml import read_yaml
from ..recipe.schema import Recipe
from ..trainer.checkpoints import checkpoints_of, is_as_written
from .checkpoint_recipe import check_same_result, recorded_values, result_values

RECIPE = "recipe.yaml"
_LOGS = ("metrics.jsonl", "nonfinite_steps.json")
_WRITTEN = (RECIPE, *_LOGS, "results.json", "student", "control", "peer", "ema", "direct", "stage-*", "checkpoint-*")


@contextmanager
def run_folder(recipe: Recipe, resume: bool) -> Iterator[Path]:
    """The folder of a recipe's run, which holds the resolved recipe and is locked while the block runs.

    Nothing that is there is removed or replaced: a folder that holds a run is refused, or resumed by the recipe that
    wrote it. A run that is refused before it has saved anything leaves nothing behind.

    Args:
        recipe: `train.output_dir` is the folder.
        resume: go on with the run that the folder holds, if it holds one.

    Raises:
        DistillError: the folder holds a run and `resume` is off, or a run of another recipe; another process writes to
            it; it cannot be written to.
    """
    folder = Path(recipe.train.output_dir)
    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(_claimed(recipe, folder, resume)))
        yield folder


@contextmanager
def _claimed(recipe: Recipe, folder: Path, resume: bool) -> Iterator[None]:
    check_unlocked(folder)  # advice for a run that ended is wrong for one that goes on
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
    """Refuse a folder that holds another run, or any run unless it is to be resumed."""
    there = _run_files(folder)
    if there and not resume:
        raise DistillError(
            f"{folder} holds a run already ({', '.join(there[:3])}). Add --resume to go on with it, or set "
            "train.output_dir to another folder. A run never removes or replaces what another one wrote."
        )
    if not there:
        return
    file = folder / RECIPE
    if file.is_file():
        check_same_result(_values_of(file), recipe, file)
    checkpoints = [*checkpoints_of(folder), *checkpoints_of(folder / "control")]
    intact = [path for path in checkpoints if is_as_written(path, "trainer_state.json")]
    records = {path: values for path in intact if (values := recorded_values(path)) is not None}
    for path, values in records.items():
        if not values:
            raise DistillError(
                f"{path} was not written by a run of a recipe, so this recipe cannot go on from it. Move it out of "
                f"{folder}, or set train.output_dir to another folder."
            )
        check_same_result(values, recipe, path / "trainer_state.json")
    if not file.is_file() and not records:
        raise DistillError(
            f"{folder} holds {', '.join(there[:3])} and no {RECIPE}, and no checkpoint there records which recipe "
            f"wrote it, so it cannot be resumed. Put the {RECIPE} of that run back, or set another train.output_dir."
        )


def _values_of(file: Path) -> dict:
    """Result values of the recipe in a run's folder."""
    try:
        values = read_yaml(file.read_text(), str(file))
        if not isinstance(values, dict):
            raise DistillError("it is not a mapping")
        return result_values(validate(values, file.parent))
    except (DistillError, OSError, UnicodeDecodeError) as error:
        raise DistillError(
            f"{file} is damaged: {error}. Restore it; or remove it and resume with the recipe that wrote the run, "
            "which is compared with what its checkpoints record."
        ) from error


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    """Write the resolved recipe; one that is there stays as it is."""
    if (folder / RECIPE).is_file():
        return
    try:
        write_atomic(folder / RECIPE, yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False))
    except OSError as error:
        raise DistillError(
            f"train.output_dir: {folder} cannot be written to ({error.strerror}): give another, or make room there."
        ) from error


def _run_files(folder: Path) -> list[str]:
    """Names of what runs write that a folder holds; other files are the user's."""
    return sorted(path.name for pattern in _WRITTEN for path in folder.glob(pattern))


def _remove_refused(folder: Path, created: list[Path], refused: bool, unlocked: bool) -> None:
    """Remove what this run wrote, if that is its recipe alone (and, of a run that was refused, its first logs)."""
    ours = [RECIPE, *(_LOGS if refused else ())]
    if set(_run_files(folder)) - {*ours}:
        return
    for name in ours:
        (folder / name).unlink(missing_ok=True)
    if unlocked:
        remove_lock_file(folder)
    for path in created:
        with suppress(OSError):  # it holds something else
            path.rmdir()
