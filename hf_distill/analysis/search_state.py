"""The folder of a temperature search: a JSON file of all measurements, written atomically, and the checkpoints."""

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from ..core import run_files
from ..core.io import damage_reported, read_json, write_json
from ..core.json_types import JSONObject
from ..errors import DistillError
from ..trainer.checkpoints import checkpoints_of
from .successive_halving import Candidate, Rung


class SearchSettings(TypedDict):
    """The values of the recipe, the criterion ("nll" or "kl"), and eta; see `find_temperature`."""

    recipe: JSONObject
    by: str
    eta: int


def load_or_create(folder: Path, settings: SearchSettings, grid: list[Candidate]) -> list[Candidate]:
    """Return the candidates with the rungs of an interrupted search, or the grid of a new search.

    Args:
        folder: of the search.
        settings: an interrupted search must have the same.
        grid: the candidates without rungs.

    Raises:
        DistillError: the folder contains another search.
    """
    saved = read_json(folder / run_files.TEMPERATURE_SEARCH)
    with damage_reported(folder / run_files.TEMPERATURE_SEARCH):
        return _restore(folder, saved, settings, grid)


def _restore(folder: Path, saved: dict, settings: SearchSettings, grid: list[Candidate]) -> list[Candidate]:
    """Return the candidates with the rungs that the file has of them."""
    if not saved and folder.is_dir() and any(folder.iterdir()):
        raise DistillError(
            f"{folder} contains files but no {run_files.TEMPERATURE_SEARCH}: choose another folder with -o."
        )
    if not saved or not any(c["rungs"] for c in saved["candidates"]):
        folder.mkdir(parents=True, exist_ok=True)
        save_search(folder, settings, grid)
        return grid
    saved_candidates = {(c["temperature"], c["alpha"]): c for c in saved["candidates"]}
    differences = [key for key, value in settings.items() if saved[key] != value]
    if {*saved_candidates} != {(c.temperature, c.alpha) for c in grid}:
        differences.append("the grid")
    if differences:
        verb = "differs" if len(differences) == 1 else "differ"
        raise DistillError(
            f"{folder} contains another search: {', '.join(differences)} {verb}. Remove the folder, or choose another "
            "one with -o."
        )
    for candidate in grid:
        rungs = saved_candidates[candidate.temperature, candidate.alpha]["rungs"]
        candidate.rungs.extend(Rung(**rung) for rung in rungs)
    return grid


def save_search(folder: Path, settings: SearchSettings, candidates: list[Candidate]) -> None:
    """Write all measurements, then delete the checkpoints of earlier rungs."""
    write_json(folder / run_files.TEMPERATURE_SEARCH, {**settings, "candidates": [asdict(c) for c in candidates]})
    for candidate in candidates:
        for rung in candidate.rungs[:-1]:
            shutil.rmtree(folder / candidate.name / f"checkpoint-{rung.step}", ignore_errors=True)


def delete_checkpoints(folder: Path, candidates: list[Candidate], remaining: list[Candidate]) -> None:
    """Delete the checkpoints of candidates that are not in `remaining`."""
    for candidate in candidates:
        if candidate not in remaining:
            for checkpoint in checkpoints_of(folder / candidate.name):
                shutil.rmtree(checkpoint, ignore_errors=True)
            with suppress(OSError):  # the folder does not exist, or contains files of others
                (folder / candidate.name).rmdir()
