"""The folder of a search: a JSON file of all measurements, written atomically, and the checkpoints."""

import json
import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypedDict

from ..core import run_files
from ..core.files import check_writable
from ..core.io import damage_reported, read_json, write_json
from ..core.json_types import JSONObject
from ..errors import DistillError
from ..trainer.checkpoints import checkpoints_of
from .successive_halving import C, Rung


class SearchSettings(TypedDict):
    """The values of the recipe, the criterion ("nll" or "kl"), and eta; see `find_temperature` and `find_shape`."""

    recipe: JSONObject
    by: str
    eta: int


def load_or_create(
    folder: Path, settings: SearchSettings, grid: list[C], file: str = run_files.TEMPERATURE_SEARCH
) -> list[C]:
    """Return the candidates with the rungs of an interrupted search, or the grid of a new search.

    Args:
        folder: of the search.
        settings: an interrupted search must have the same.
        grid: the candidates without rungs.
        file: name of the JSON file.

    Raises:
        DistillError: the folder contains another search, or cannot be written to.
    """
    check_writable(folder)
    saved = read_json(folder / file)
    with damage_reported(folder / file):
        return _restore(folder, saved, settings, grid, file)


def _restore(folder: Path, saved: dict, settings: SearchSettings, grid: list[C], file: str) -> list[C]:
    """Return the candidates with the rungs that the file has of them."""
    if not saved and folder.is_dir() and any(folder.iterdir()):
        raise DistillError(f"{folder} contains files but no {file}: choose another folder with -o.")
    if not saved or not any(c["rungs"] for c in saved["candidates"]):
        folder.mkdir(parents=True, exist_ok=True)
        save_search(folder, settings, grid, file)
        return grid
    saved_candidates = {_values(c): c for c in saved["candidates"]}
    differences = [key for key, value in settings.items() if saved[key] != value]
    if {*saved_candidates} != {_values(_as_dict(c)) for c in grid}:
        differences.append("the grid")
    if differences:
        verb = "differs" if len(differences) == 1 else "differ"
        raise DistillError(
            f"{folder} contains another search: {', '.join(differences)} {verb}. Remove the folder, or choose another "
            "one with -o."
        )
    for candidate in grid:
        rungs = saved_candidates[_values(_as_dict(candidate))]["rungs"]
        candidate.rungs.extend(Rung(**rung) for rung in rungs)
    return grid


def _as_dict(candidate: Any) -> dict[str, Any]:
    return asdict(candidate)


def _values(candidate: dict[str, Any]) -> str:
    """Return what distinguishes a candidate from others, without its rungs and whether it is that of the recipe."""
    return json.dumps({key: value for key, value in candidate.items() if key not in ("rungs", "from_recipe")})


def save_search(
    folder: Path, settings: SearchSettings, candidates: list[C], file: str = run_files.TEMPERATURE_SEARCH
) -> None:
    """Write all measurements, then delete the checkpoints of earlier rungs."""
    write_json(folder / file, {**settings, "candidates": [*map(_as_dict, candidates)]})
    for candidate in candidates:
        for rung in candidate.rungs[:-1]:
            shutil.rmtree(folder / candidate.name / f"checkpoint-{rung.step}", ignore_errors=True)


def delete_checkpoints(folder: Path, candidates: list[C], remaining: list[C]) -> None:
    """Delete the checkpoints of candidates that are not in `remaining`."""
    for candidate in candidates:
        if candidate not in remaining:
            for checkpoint in checkpoints_of(folder / candidate.name):
                shutil.rmtree(checkpoint, ignore_errors=True)
            with suppress(OSError):  # the folder does not exist, or contains files of others
                (folder / candidate.name).rmdir()
