"""Which checkpoints are whole. One is marked before anything is written into it, and sealed when all of it is on disk.

The seal names each file and its size, so that a checkpoint that was cut off, by a kill or on its way to another
machine, is known from a whole one.
"""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .evidence import write_json

SEAL = "checkpoint.json"
_STATE = "trainer_state.json"


def begin(folder: Path) -> None:
    """Mark a checkpoint as not yet whole, and take away what an earlier attempt left there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / SEAL, {"whole": False})


def seal(folder: Path) -> None:
    """Have the system write a checkpoint's files to the disk, then say that it is whole."""
    files = {path for path in folder.rglob("*") if path.is_file() and path.name != SEAL}
    for path in files:
        _flush(path)
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(files)}
    write_json(folder / SEAL, {"whole": True, "files": sizes})
    with suppress(OSError):  # not every system opens folders
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def flaw(folder: Path) -> str | None:
    """Why training cannot be resumed from a checkpoint; None: it is whole, or a Trainer without seals wrote it."""
    try:
        told = json.loads((folder / SEAL).read_text())
    except FileNotFoundError:
        told = {"whole": True, "files": {}}
    except ValueError:
        return f"its {SEAL} cannot be read"
    if not told.get("whole"):
        return "it was not written to its end"
    for name, size in told["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is not there"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, of {size:,}"
    try:
        TrainerState.load_from_json(str(folder / _STATE))
    except FileNotFoundError:
        return f"{_STATE} is not there"
    except (ValueError, TypeError):
        return f"its {_STATE} cannot be read"
    return None


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, newest first."""
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = [(int(step), path) for step, path in found if step.isdecimal() and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint of an output folder that is whole; None if there is none."""
    return next((path for path in checkpoints_of(folder) if flaw(path) is None), None)
