"""Complete and incomplete checkpoints: marking, checking, removal and rotation.

A checkpoint is marked as incomplete before its first file is written, and as complete when all files are on the disk.
The mark (`checkpoint.json`) records the size and the XXH3-128 digest of each file, so that a checkpoint that was
truncated or damaged by a kill, a disk or a copy is recognized. Before the files of a checkpoint are deleted, its folder
is renamed, so that an interrupted removal never leaves a folder that looks like a complete checkpoint.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, sort_checkpoints

from ..core.files import flush
from ..core.io import write_json

MARK_FILE = "checkpoint.json"
_STATE_FILE = "trainer_state.json"
# The Trainer's pushes to the Hub leave out names with these prefixes.
_REMOVED, _REPLACED = "_removed-", "_replaced-"
_WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    size: int
    xxh3_128: str


class _Mark(BaseModel):
    """Contents of `checkpoint.json`; `digest` is the digest of `files`, which shows damage to the mark itself."""

    model_config = ConfigDict(extra="forbid", strict=True)
    is_complete: bool = Field(alias="whole")  # the key of the file format
    files: dict[str, _File] = {}
    digest: str = ""


@dataclass(frozen=True)
class CheckpointDefect:
    """Why training cannot be resumed from a checkpoint.

    state:  "unfinished": writing it was interrupted; "damaged": a file differs from what was written; "changed":
            weights were added afterwards, for example by sharding them again
    reason: a clause for messages
    """

    state: Literal["unfinished", "damaged", "changed"]
    reason: str

    def __str__(self) -> str:
        return self.reason


def mark_incomplete(folder: Path) -> None:
    """Create the folder of a checkpoint, marked as incomplete.

    A folder of the same name is renamed, unless it is an incomplete or damaged checkpoint of a `DistillTrainer`, which
    is removed. `mark_complete` deletes the renamed checkpoint and keeps files that it did not consist of.
    """
    if folder.exists():
        defect = checkpoint_defect(folder, digests=False)
        if defect is None or defect.state == "changed" or not (folder / MARK_FILE).exists():
            _delete(folder.with_name(f"{_REPLACED}{folder.name}"))
            folder.rename(folder.with_name(f"{_REPLACED}{folder.name}"))
        else:
            remove(folder)
    folder.mkdir(parents=True)
    write_json(folder / MARK_FILE, {"whole": False})


def mark_complete(folder: Path) -> None:
    """Flush the files of a checkpoint to the disk, then mark it as complete."""
    _keep_other_files(folder.with_name(f"{_REPLACED}{folder.name}"), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARK_FILE)
    with ThreadPoolExecutor(4) as pool:  # hashing and flushing release the interpreter lock
        entries = {
            str(path.relative_to(folder)): entry for path, entry in zip(files, pool.map(_entry, files), strict=True)
        }
    write_json(folder / MARK_FILE, {"whole": True, "files": entries, "digest": _digest_of(entries)})
    for path in (folder, folder.parent):
        with suppress(OSError):  # not every file system can open a folder
            flush(path)
    _delete(folder.with_name(f"{_REPLACED}{folder.name}"))


def _keep_other_files(replaced: Path, folder: Path) -> None:
    """Move files that a replaced checkpoint did not consist of, such as those of the user, into the new one.

    Files of weights are not kept: a shard of an interrupted attempt would become a part of the new checkpoint.
    """
    try:
        recorded = _Mark.model_validate_json((replaced / MARK_FILE).read_bytes()).files.keys()
    except (OSError, ValueError):
        recorded = {}.keys()
    for path in sorted(path for path in replaced.rglob("*") if path.is_file()):
        name = path.relative_to(replaced)
        is_stale = str(name) in recorded or name.name.startswith(MARK_FILE) or name.name.endswith(_WEIGHTS_SUFFIXES)
        if not is_stale and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            path.rename(folder / name)


def _entry(path: Path) -> dict[str, int | str]:
    flush(path)
    return {"size": path.stat().st_size, "xxh3_128": _digest(path)}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _digest_of(entries: Mapping[str, Mapping[str, int | str]]) -> str:
    return xxhash.xxh3_128(json.dumps(entries, sort_keys=True).encode()).hexdigest()


def checkpoint_defect(folder: Path, digests: bool = True) -> CheckpointDefect | None:
    """Return why training cannot be resumed from a checkpoint; None if it can.

    A checkpoint without a mark was written by a plain Trainer and has no defect that could be found.

    Args:
        folder: the checkpoint.
        digests: whether to read all files and compare their digests; otherwise only sizes are compared.
    """
    defect = _difference_from_mark(folder, digests)
    if defect is not None:
        return defect
    try:
        TrainerState.load_from_json(str(folder / _STATE_FILE))
    except FileNotFoundError:  # the Trainer writes it last, so writing was interrupted
        return CheckpointDefect("unfinished", f"{_STATE_FILE} is missing")
    except (OSError, ValueError, TypeError, AttributeError):
        return CheckpointDefect("damaged", f"{_STATE_FILE} cannot be read")
    return None


def _difference_from_mark(folder: Path, digests: bool) -> CheckpointDefect | None:
    """Return the first difference between a checkpoint and its mark."""
    try:
        mark = _Mark.model_validate_json((folder / MARK_FILE).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return CheckpointDefect("damaged", f"its {MARK_FILE} cannot be read")
    if not mark.is_complete:
        return CheckpointDefect("unfinished", "writing it was interrupted")
    if mark.digest != _digest_of({name: entry.model_dump() for name, entry in mark.files.items()}):
        return CheckpointDefect("damaged", f"its {MARK_FILE} is damaged")
    paths = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {MARK_FILE}
    added = sorted(name for name in paths - mark.files.keys() if name.endswith(_WEIGHTS_SUFFIXES))
    if added:
        return CheckpointDefect("changed", f"{added[0]} was added after the checkpoint was written")
    for name, entry in mark.files.items():
        path = folder / name
        if not path.is_file():
            return CheckpointDefect("damaged", f"{name} is missing")
        if (size := path.stat().st_size) != entry.size:
            return CheckpointDefect("damaged", f"{name} has {size:,} bytes instead of {entry.size:,}")
    if digests:
        return _digest_mismatch(folder, mark.files)
    return None


def is_as_written(folder: Path, name: str) -> bool:
    """Return whether a file of a checkpoint has the digest in the mark; True if the checkpoint has no mark."""
    try:
        mark = _Mark.model_validate_json((folder / MARK_FILE).read_bytes())
        return name in mark.files and mark.files[name].xxh3_128 == _digest(folder / name)
    except FileNotFoundError:
        return not (folder / MARK_FILE).exists()
    except (OSError, ValueError):
        return False


def _digest_mismatch(folder: Path, files: dict[str, _File]) -> CheckpointDefect | None:
    with ThreadPoolExecutor(4) as pool:
        for name, digest in zip(files, pool.map(lambda name: _digest_if_readable(folder / name), files), strict=True):
            if digest != files[name].xxh3_128:
                problem = "cannot be read" if digest is None else "is damaged (its digest is not the recorded one)"
                return CheckpointDefect("damaged", f"{name} {problem}")
    return None


def _digest_if_readable(path: Path) -> str | None:
    try:
        return _digest(path)
    except OSError:
        return None


def remove(folder: Path) -> None:
    """Delete a checkpoint; if this is interrupted, no folder is left that looks like a checkpoint."""
    target = folder.with_name(f"{_REMOVED}{folder.name}")
    _delete(target)
    with suppress(FileNotFoundError):
        folder.rename(target)
    _delete(target)


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def restore(output_dir: Path) -> None:
    """Finish removals and replacements of checkpoints that were interrupted."""
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
    """Hide the warning of transformers that sorts checkpoints of equal times by step, which is correct too."""
    log = logging.getLogger("transformers.trainer_utils")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def rotate(output_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints beyond a limit, as the Trainer does, but never the newest or the best one.

    Args:
        output_dir: the output folder of the training.
        newest: the checkpoint that was just completed.
        limit: `save_total_limit` of the training arguments.
        best: `best_model_checkpoint` of the Trainer's state.
    """
    if limit is None or limit <= 0:
        return
    protected = {newest.name} | ({Path(best).name} if best else set())
    with _quiet_sorting():
        paths = [Path(path) for path in sort_checkpoints(str(output_dir), use_mtime=True)]
    excess = len(paths) - max(limit, len(protected))
    for path in [path for path in paths if path.name not in protected][: max(excess, 0)]:
        remove(path)


def checkpoints_of(folder: Path) -> list[Path]:
    """Return the checkpoints of an output folder, newest first."""
    candidates = [(path.name.rpartition("-")[2], path) for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    steps = [(int(step), path) for step, path in candidates if step.isdecimal() and path.is_dir()]
    return [path for _, path in sorted(steps, reverse=True)]


def latest_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint whose files all have their recorded sizes; None if there is none.

    This does not read the files and serves messages; before training resumes, `checkpoint_defect` compares digests.
    """
    return next((path for path in checkpoints_of(folder) if checkpoint_defect(path, digests=False) is None), None)


def hint(path: Path, defect: CheckpointDefect) -> str:
    """Return how to resume from a checkpoint that was changed on purpose; empty if writing it was interrupted."""
    if defect.state == "unfinished":
        return ""
    if defect.state == "damaged":  # nearly always caused by a disk or a copy
        return " (For a checkpoint that you edited yourself, see docs/fault-tolerance.md.)"
    return f" If you changed it on purpose, delete {path / MARK_FILE}. Training then resumes from it without checks."


def list_defects(defects: Iterable[tuple[Path, CheckpointDefect]]) -> str:
    """Return the names of checkpoints with their defects, for a message."""
    return "; ".join(f"{path.name}: {defect}" for path, defect in defects)
