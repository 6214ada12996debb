"""The folder of a search: a JSON file of what is known, whole at any moment, and the checkpoints to go on from."""

import shutil
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core.io import damage_reported, read_json, write_json
from ..errors import DistillError
from ..trainer.checkpoints import checkpoints_of
from .successive_halving import Candidate, Rung

FILE = "temperature.json"


def load_or_create(place: Path, asked: dict[str, Any], grid: list[Candidate]) -> list[Candidate]:
    """The candidates as a search before left them, or as they are given.

    Raises:
        DistillError: the folder is that of another search.
    """
    before = read_json(place / FILE)
    with damage_reported(place / FILE):
        return _known(place, before, asked, grid)


def _known(place: Path, before: dict[str, Any], asked: dict[str, Any], grid: list[Candidate]) -> list[Candidate]:
    """The candidates with the rungs that the file has of them."""
    if not before and place.is_dir() and any(place.iterdir()):
        raise DistillError(f"{place} holds files and no {FILE}: choose another folder with -o.")
    if not before or not any(c["rungs"] for c in before["candidates"]):
        place.mkdir(parents=True, exist_ok=True)
        save_search(place, asked, grid)
        return grid
    known = {(c["temperature"], c["alpha"]): c for c in before["candidates"]}
    differ = [key for key in asked if before[key] != asked[key]]
    if {*known} != {(c.temperature, c.alpha) for c in grid}:
        differ.append("the grid")
    if differ:
        raise DistillError(
            f"{place} holds another search: {', '.join(differ)} differ. Remove it, or choose another folder with -o."
        )
    for candidate in grid:
        candidate.rungs.extend(Rung(**rung) for rung in known[candidate.temperature, candidate.alpha]["rungs"])
    return grid


def save_search(place: Path, asked: dict[str, Any], candidates: list[Candidate]) -> None:
    """Write what is known; then no earlier checkpoint is needed."""
    write_json(place / FILE, asked | {"candidates": [asdict(c) for c in candidates]})
    for candidate in candidates:
        for rung in candidate.rungs[:-1]:
            shutil.rmtree(place / candidate.name / f"checkpoint-{rung.step}", ignore_errors=True)


def delete_checkpoints(place: Path, candidates: list[Candidate], kept: list[Candidate]) -> None:
    """Remove the checkpoints of candidates that are not kept."""
    for candidate in candidates:
        if candidate not in kept:
            for checkpoint in checkpoints_of(place / candidate.name):
                shutil.rmtree(checkpoint, ignore_errors=True)
            with suppress(OSError):  # it is not there, or holds files of someone else
                (place / candidate.name).rmdir()
