"""An unfinished capture: which cache its folder belongs to, and which of its files are complete.

Beside each file that is complete lies its entry (name, bytes, SHA-256, and of a shard its counts) with a checksum of
the entry itself. A capture that goes on verifies all of them first, so that it never builds on a damaged file: what is
damaged is removed, and written again.
"""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..core.locks import LOCK_FILE, lock_folder
from ..core.processes import run_on_main
from ..errors import DistillError
from .files import atomic_path, check_files, checksum_of, file_error
from .manifest import CAPTURE, FILE, HEAD, Manifest, read_manifest
from .ranks import barrier, gather_lists, rank, world_size
from .reader import write_index

logger = logging.get_logger(__name__)


def shard_file(number: int) -> str:
    """The name of a shard."""
    return f"shard-{number:05}.arrow"


@contextmanager
def lock_capture(folder: Path) -> Iterator[None]:
    """Hold the folder's lock while the block runs: the main process takes it, and all learn where it cannot.

    Raises:
        DistillError: another process writes into the folder, or it cannot be written to.
    """
    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_folder(folder, "hf-distill cache write")))
        yield


def open_output(folder: Path, manifest: Manifest) -> Manifest | None:
    """Make the folder this capture's; the manifest if the cache is complete already.

    Raises:
        DistillError: the folder holds another cache or other files, or the complete cache is damaged.
    """
    for name in (FILE, CAPTURE):
        if (folder / name).is_file():
            there = read_manifest(folder, name)
            if problems := there.differs(manifest):
                raise DistillError(
                    f"{folder} holds another cache: {'; '.join(problems)}. Give another folder, or remove this one."
                )
            if name == FILE:
                _check_complete(folder, there)
                _remove_temporary(folder)
                return there
    barrier()
    run_on_main(lambda: _begin(folder, manifest))
    return None


def _begin(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the capture, unless it is there already."""
    if (folder / CAPTURE).is_file():
        return
    if others := [f.name for f in folder.iterdir() if f.suffix != ".half" and f.name != LOCK_FILE]:
        raise DistillError(f"{folder} holds {', '.join(sorted(others)[:3])} and no cache: give an empty folder.")
    manifest.write(folder / CAPTURE)


def _check_complete(folder: Path, manifest: Manifest) -> None:
    """Refuse a complete cache of which a file is damaged; each process reads its share of the files."""
    mine = manifest.files[rank() :: world_size()]
    if damages := gather_lists([damage for entry in mine if (damage := file_error(folder, entry))]):
        raise DistillError(
            f"{folder} is a complete cache, and {'; '.join(damages)}: remove the folder and write the cache again, or "
            "get these files from where it came from."
        )


def verify_written(folder: Path, count: int) -> list[bool]:
    """Which shards are complete; each process verifies those that it would write, and removes what is damaged.

    Args:
        folder: of the capture.
        count: how many shards it will have.

    Raises:
        DistillError: a folder stands where a file of the capture belongs.
    """
    files = [shard_file(number) for number in range(rank(), count, world_size())]
    files += [HEAD] if rank() == 0 else []
    if folders := gather_lists([path for f in files for path in (folder / f, _entry_file(folder, f)) if path.is_dir()]):
        raise DistillError(f"{', '.join(map(str, folders))}: a folder stands where a file belongs: remove it.")
    damages = []
    for file in files:
        if _entry_file(folder, file).exists() and (damage := _damage(folder, file)):
            damages.append(damage)
            _entry_file(folder, file).unlink()
            (folder / file).unlink(missing_ok=True)
        elif file == HEAD and not _entry_file(folder, file).exists():
            (folder / file).unlink(missing_ok=True)  # it was cut off before its digest was recorded
    if (damages := gather_lists(damages)) and rank() == 0:
        logger.warning(f"Of the unfinished cache {folder} these files are written again: {'; '.join(damages)}.")
    barrier()  # before anybody writes: all must know the same shards as complete
    return [is_written(folder, shard_file(number)) for number in range(count)]


def _damage(folder: Path, file: str) -> str | None:
    entry = read_entry(folder, file)
    return f"the entry of {file} is damaged" if entry is None else file_error(folder, entry)


def is_written(folder: Path, file: str) -> bool:
    """Whether a file was completed: its entry is written after it."""
    return _entry_file(folder, file).is_file()


def write_entry(folder: Path, entry: dict[str, Any]) -> None:
    """Record that a file is complete, with a checksum of the record itself."""
    with atomic_path(_entry_file(folder, entry["file"])) as half:
        half.write_text(json.dumps(entry | {"checksum": checksum_of(entry)}))


def read_entry(folder: Path, file: str) -> dict[str, Any] | None:
    """What was recorded of a file; None: the record is damaged."""
    try:
        entry = json.loads(_entry_file(folder, file).read_text())
        checksum = entry.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return entry if checksum == checksum_of(entry) and entry["file"] == file else None


def finish(folder: Path, manifest: Manifest, count: int) -> Manifest:
    """All shards are there: index and manifest are written, and what belongs to the capture alone is removed.

    Raises:
        DistillError: a file was damaged while the capture ran.
    """
    run_on_main(lambda: _complete(folder, manifest, count))
    _remove_temporary(folder)
    barrier()
    return read_manifest(folder)


def _complete(folder: Path, manifest: Manifest, count: int) -> None:
    entries = {file: read_entry(folder, file) for file in map(shard_file, range(count))}
    if is_written(folder, HEAD):
        entries[HEAD] = read_entry(folder, HEAD)
    if damaged := [file for file, entry in entries.items() if entry is None]:
        raise DistillError(f"In {folder} the entries of {', '.join(damaged)} are damaged: run the command again.")
    head = entries.pop(HEAD, None)
    shards = [entry for entry in entries.values() if entry is not None]
    check_files(folder, *shards, *([head] if head else []))
    replace(manifest, shards=shards, index=write_index(folder, shards), head=head).write(folder / FILE)


def _remove_temporary(folder: Path) -> None:
    """Remove what belongs to the capture alone."""
    if rank() == 0:
        for file in [*folder.glob("shard-*.json"), *folder.glob("*.half"), _entry_file(folder, HEAD), folder / CAPTURE]:
            file.unlink(missing_ok=True)


def _entry_file(folder: Path, file: str) -> Path:
    return (folder / file).with_suffix(".json")
