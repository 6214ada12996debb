"""A run's folder: whose it is."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml

from ..errors import DistillError
from ..evidence import write_whole
from ..names import kind_of
from ..recipe.schema import Recipe


def claim(recipe: Recipe, resume: bool) -> Path:
    """The run's folder, with the resolved recipe in it.

    Raises:
        DistillError: it holds a run and `resume` is off, or the run of another recipe; it cannot be written to.
    """
    folder = Path(recipe.train.output_dir)
    text = yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False)
    resolved = yaml.safe_load(text)
    file = folder / "recipe.yaml"
    if file.is_file() and not resume:
        if kind_of(recipe.base) == "smoke":
            shutil.rmtree(folder)
        else:
            raise DistillError(
                f"{folder} holds a run already. Add --resume to go on with it, or set train.output_dir to another "
                "folder."
            )
    if file.is_file():
        before = yaml.safe_load(file.read_text())
        said = (resolved.keys() | before.keys()) - {"origin", "requires"}  # an equal recipe may have moved
        changed = [key for key in sorted(said) if resolved.get(key) != before.get(key)]
        if set(changed) - {"train"}:
            raise DistillError(
                f"{folder} holds a run of another recipe: {', '.join(changed)} differ. Resume it with its own recipe "
                f"({file}), or set train.output_dir to another folder."
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, text)
    except OSError as error:
        raise DistillError(
            f"train.output_dir: {folder} cannot be written to ({error.strerror}): give another, or make room there."
        ) from error
    return folder


@contextmanager
def released(folder: Path) -> Iterator[None]:
    """Where the block fails, and the folder holds its recipe alone, the folder is given back: nothing had begun."""
    try:
        yield
    except BaseException:
        if [path.name for path in folder.glob("*")] == ["recipe.yaml"]:
            (folder / "recipe.yaml").unlink(missing_ok=True)  # processes may meet here
            with suppress(OSError):
                folder.rmdir()
        raise
