"""Which checkpoints are complete. One is marked before anything is written into it, and sealed when it is on disk.

The mark (`checkpoint.json`) records the size and the XXH3-128 digest of each file, so that a checkpoint that was cut
off or damaged, by a kill, a disk or a copy, is told from a complete one. No removal can leave a part of a checkpoint
that looks complete: a folder is renamed before its files are deleted.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..core.io import write_json

MARK_FILE = "checkpoint.json"
_STATE = "trainer_state.json"
# A Trainer's pushes to the Hub leave out names that begin so.
_REMOVED, _REPLACED = "_removed-", "_replaced-"
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: int
    xxh3_128: str


class _Mark(BaseModel):
    """Contents of `checkpoint.json`; `digest` is that of `files`, so that damage to the mark itself is seen."""

    model_config = ConfigDict(extra="forbid", strict=True)
    whole: bool
    files: dict[str, _File] = {}
    digest: str = ""


@dataclass(frozen=True)
class CheckpointDefect:
    """Why training cannot be resumed from a checkpoint.

    state:  "unfinished": its writing was interrupted; "damaged": a file differs from what was written; "changed": it
            holds weights that were added afterwards, as after sharding anew
    reason: for a message
    """

    state: Literal["unfinished", "damaged", "changed"]
    reason: str

    def __str__(self) -> str:
        return self.reason


def mark_incomplete(folder: Path) -> None:
    """Mark a checkpoint as not yet complete. A complete one of the same step is kept aside until `seal`."""
    if folder.exists():
        if checkpoint_defect(folder, digests=False) is None:
            _delete(folder.with_name(f"{_REPLACED}{folder.name}"))
            folder.rename(folder.with_name(f"{_REPLACED}{folder.name}"))
        else:
            remove(folder)
    folder.mkdir(parents=True)
    write_json(folder / MARK_FILE, {"whole": False})


def mark_complete(folder: Path) -> None:
    """Have the system write a checkpoint's files to the disk, then mark it as complete."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK_FILE)
    with ThreadPoolExecutor(4) as pool:  # hashing and flushing release the interpreter lock
        entries = {
            str(path.relative_to(folder)): entry for path, entry in zip(files, pool.map(_entry, files), strict=True)
        }
    write_json(folder / MARK_FILE, {"whole": True, "files": entries, "digest": _digest_of(entries)})
    for path in (folder / MARK_FILE, folder, folder.parent):
        with suppress(OSError):  # not every system opens folders
            _flush(path)
    _delete(folder.with_name(f"{_REPLACED}{folder.name}"))


def _entry(path: Path) -> dict[str, Any]:
    _flush(path)
    return {"size": path.stat().st_size, "xxh3_128": _digest(path)}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _digest_of(entries: dict[str, Any]) -> str:
    return xxhash.xxh3_128(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def checkpoint_defect(folder: Path, digests: bool = True) -> CheckpointDefect | None:
    """Why training cannot be resumed from a checkpoint; None: it is complete, or has no mark (of a plain Trainer).

    Args:
        folder: of the checkpoint.
        digests: whether to read all files; else their sizes are compared.
    """
    found = _damage(folder, digests)
    if found is not None:
        return found
    try:
        TrainerState.load_from_json(str(folder / _STATE))
    except FileNotFoundError:  # a Trainer writes it last, and the kill may have come before the mark
        return CheckpointDefect("unfinished", f"{_STATE} is missing")
    except (OSError, ValueError, TypeError, AttributeError):
        return CheckpointDefect("damaged", f"{_STATE} cannot be read")
    return None


def _damage(folder: Path, digests: bool) -> CheckpointDefect | None:
    """The first difference between a checkpoint and its mark."""
    try:
        mark = _Mark.model_validate_json((folder / MARK_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return CheckpointDefect("damaged", f"its {MARK_FILE} cannot be read")
    if not mark.whole:
        return CheckpointDefect("unfinished", "it was not written to its end")
    if mark.digest != _digest_of({name: entry.model_dump() for name, entry in mark.files.items()}):
        return CheckpointDefect("damaged", f"its {MARK_FILE} is damaged")
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MARK_FILE}
    added = sorted(name for name in paths - mark.files.keys() if name.endswith(_WEIGHTS))
    if added:
        return CheckpointDefect("changed", f"{added[0]} was added after it was written")
    for name, entry in mark.files.items():
        path = folder / name
        if not path.is_file():
            return CheckpointDefect("damaged", f"{name} is missing")
        if (size := path.stat().st_size) != entry.size:
            return CheckpointDefect("damaged", f"{name} has {size:,} bytes instead of {entry.size:,}")
    if digests:
        return _changed_bytes(folder, mark.files)
    return None


def is_as_written(folder: Path, name: str) -> bool:
    """Whether a file of a checkpoint has the digest that its mark records; True where there is no mark."""
    try:
        mark = _Mark.model_validate_json((folder / MARK_FILE).read_bytes())
        return name in mark.files and mark.files[name].xxh3_128 == _digest(folder / name)
    except FileNotFoundError:
        return not (folder / MARK_FILE).exists()
    except (OSError, ValueError):
        return False


def _changed_bytes(folder: Path, files: dict[str, _File]) -> CheckpointDefect | None:
    with ThreadPoolExecutor(4) as pool:
        for name, digest in zip(files, pool.map(lambda name: _digest_if_readable(folder / name), files), strict=True):
            if digest != files[name].xxh3_128:
                what = "cannot be read" if digest is None else "is damaged (its digest is not the recorded one)"
                return CheckpointDefect("damaged", f"{name} {what}")
    return None


def _digest_if_readable(path: Path) -> str | None:
    try:
        return _digest(path)
    except OSError:
        return None


def remove(folder: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves nothing that looks like one."""
    target = folder.with_name(f"{_REMOVED}{folder.name}")
    _delete(target)
    with suppress(FileNotFoundError):
        folder.rename(target)
    _delete(target)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def restore(output_dir: Path) -> None:
    """Finish what a kill interrupted: removals, and the replacement of a checkpoint by one of the same step."""
    for path in output_dir.glob(f"{_REMOVED}{PREFIX_CHECKPOINT_DIR}-*"):
        _delete(path)
    for path in output_dir.glob(f"{_REPLACED}{PREFIX_CHECKPOINT_DIR}-*"):
        folder = path.with_name(path.name.removeprefix(_REPLACED))
        if folder.is_dir() and checkpoint_defect(folder, digests=False) is None:
            _delete(path)
        else:
            remove(folder)
            path.rename(folder)


@contextmanager
def _quiet_sorting() -> Iterator[None]:
    """transformers warns where all checkpoints have one time, and sorts by steps, which is right too."""
    log = logging.getLogger("transformers.trainer_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def rotate(output_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond a limit, as a Trainer does; never the newest or the best one.

    Args:
        output_dir: of the run.
        newest: the checkpoint that was just sealed.
        limit: `save_total_limit`.
        best: `best_model_checkpoint` of the Trainer's state.
    """
    if limit is None or limit <= 0:
        return
    kept = {newest.name} | ({Path(best).name} if best else set())
    with _quiet_sorting():
        paths = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    excess = len(paths) - max(limit, len(kept))
    for path in [path for path in paths if path.name not in kept][: max(excess, 0)]:
        remove(path)


def checkpoints_of(folder: Path) -> list[Path]:
    """The checkpoints of an output folder, newest first."""
    found = [(path.name.rpartition("-")[2], path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = [(int(step), path) for step, path in found if step.isdecimal() and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def latest_complete(folder: Path) -> Path | None:
    """The newest checkpoint of an output folder with all its files in their sizes; None if there is none.

    For messages: before training resumes from one, `flaw` reads it.
    """
    return next((path for path in checkpoints_of(folder) if checkpoint_defect(path, digests=False) is None), None)


def hint(path: Path, found: CheckpointDefect) -> str:
    """How a user accepts a checkpoint that was changed on purpose; empty where its writing was interrupted."""
    if found.state == "unfinished":
        return ""
    if found.state == "damaged":  # which is nearly always a fault of a disk or a copy
        return " (For a checkpoint that you edited yourself, see docs/fault-tolerance.md.)"
    return f" If you changed it on purpose, delete {path / MARK_FILE}: training then resumes from it without checks."


def listed(flaws: Iterable[tuple[Path, CheckpointDefect]]) -> str:
    """Checkpoints with their flaws, for a message."""
    return "; ".join(f"{path.name}: {found}" for path, found in flaws)
