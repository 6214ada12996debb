"""Unfinished caches: which cache a folder belongs to, and which of its files are complete.

For each complete file a JSON file stores its entry (name, bytes, SHA-256, and the counts of a shard) with a checksum of
the entry. A resumed write first verifies all files; damaged files are removed and written again.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from transformers.utils import logging

from ..core.files import FileEntry, ShardEntry, check_files, checksum_of, file_error
from ..core.locks import LOCK_FILE, lock_folder
from ..core.processes import run_on_main
from ..errors import DistillError
from .manifest import CAPTURE, FILE, HEAD, Manifest, atomic_cache_file, read_manifest
from .ranks import barrier, gather_lists, rank, world_size
from .reader import write_index

logger = logging.get_logger(__name__)


def shard_file(number: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05}.arrow"


@contextmanager
def lock_capture(folder: Path) -> Iterator[None]:
    """Lock the folder while the block runs; the main process locks it, and a failure raises on all processes.

    Raises:
        DistillError: another process writes to the folder, or the folder is not writable.
    """
    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_folder(folder, "hf-distill cache write")))
        yield


def open_output(folder: Path, manifest: Manifest) -> Manifest | None:
    """Prepare a folder for writing; return the manifest if it already holds the complete cache, otherwise None.

    Raises:
        DistillError: the folder holds another cache or other files, or the complete cache is damaged.
    """
    for name in (FILE, CAPTURE):
        if (folder / name).is_file():
            existing = read_manifest(folder, name)
            if differences := existing.differs(manifest):
                raise DistillError(
                    f"{folder} holds another cache: {'; '.join(differences)}. Choose another folder or remove it."
                )
            if name == FILE:
                _check_complete(folder, existing)
                _remove_temporary(folder)
                return existing
    barrier()
    run_on_main(lambda: _write_capture_manifest(folder, manifest))
    return None


def remove_other(folder: Path, manifest: Manifest) -> None:
    """Remove a folder that holds another cache, or one whose manifest is damaged; other folders stay as they are."""
    for name in (FILE, CAPTURE):
        if not (folder / name).is_file():
            continue
        try:
            is_other = bool(read_manifest(folder, name).differs(manifest))
        except DistillError:
            is_other = True
        if is_other:
            shutil.rmtree(folder)
            return


def _write_capture_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of the unfinished cache, unless it exists."""
    if (folder / CAPTURE).is_file():
        return
    if others := [file.name for file in folder.iterdir() if file.suffix != ".half" and file.name != LOCK_FILE]:
        raise DistillError(f"{folder} holds {', '.join(sorted(others)[:3])} and no cache: choose an empty folder.")
    manifest.write(folder / CAPTURE)


def _check_complete(folder: Path, manifest: Manifest) -> None:
    """Refuse a complete cache with damaged files; each process verifies its share of the files."""
    entries = manifest.files[rank() :: world_size()]
    if errors := gather_lists([error for entry in entries if (error := file_error(folder, entry))]):
        raise DistillError(
            f"{folder} is a complete cache, but {'; '.join(errors)}. Remove the folder and write the cache again, or "
            "copy these files from the original again."
        )


def verify_written(folder: Path, count: int) -> list[bool]:
    """Verify the shards that each process would write, remove damaged ones, and return which shards are complete.

    Args:
        folder: the folder of the unfinished cache.
        count: number of shards of the complete cache.

    Raises:
        DistillError: a folder has the name of a file of the cache.
    """
    files = [shard_file(number) for number in range(rank(), count, world_size())]
    files += [HEAD] if rank() == 0 else []
    paths = [path for file in files for path in (folder / file, _entry_file(folder, file))]
    if folders := gather_lists([path for path in paths if path.is_dir()]):
        raise DistillError(f"{', '.join(map(str, folders))}: a folder has the name of a file of the cache: remove it.")
    errors = []
    for file in files:
        if _entry_file(folder, file).exists() and (error := _verification_error(folder, file)):
            errors.append(error)
            _entry_file(folder, file).unlink()
            (folder / file).unlink(missing_ok=True)
        elif file == HEAD and not _entry_file(folder, file).exists():
            (folder / file).unlink(missing_ok=True)  # the write was interrupted before its entry was written
    if (errors := gather_lists(errors)) and rank() == 0:
        logger.warning(f"Damaged files of the unfinished cache {folder} are written again: {'; '.join(errors)}.")
    barrier()  # all processes must see the same complete shards before one of them writes
    return [is_written(folder, shard_file(number)) for number in range(count)]


def _verification_error(folder: Path, file: str) -> str | None:
    entry = read_entry(folder, file)
    return f"the entry of {file} is damaged" if entry is None else file_error(folder, entry)


def is_written(folder: Path, file: str) -> bool:
    """Whether a file is complete: its entry is written after it."""
    return _entry_file(folder, file).is_file()


def write_entry(folder: Path, entry: FileEntry) -> None:
    """Write the entry of a complete file, with a checksum of the entry."""
    with atomic_cache_file(_entry_file(folder, entry["file"])) as temporary:
        temporary.write_text(json.dumps({**entry, "checksum": checksum_of(entry)}))


def read_entry(folder: Path, file: str) -> ShardEntry | None:
    """Read the entry of a file, which has no counts if it is no shard; None if the entry is damaged."""
    try:
        entry = json.loads(_entry_file(folder, file).read_text())
        checksum = entry.pop("checksum")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None
    return entry if checksum == checksum_of(entry) and entry["file"] == file else None


def finish(folder: Path, manifest: Manifest, count: int) -> Manifest:
    """Write index and manifest after all shards are complete, and remove the files of the unfinished cache.

    Raises:
        DistillError: a file was damaged during the write.
    """
    run_on_main(lambda: _write_manifest(folder, manifest, count))
    _remove_temporary(folder)
    barrier()
    return read_manifest(folder)


def _write_manifest(folder: Path, manifest: Manifest, count: int) -> None:
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
    """Remove the files that only an unfinished cache has."""
    if rank() == 0:
        for file in [*folder.glob("shard-*.json"), *folder.glob("*.half"), _entry_file(folder, HEAD), folder / CAPTURE]:
            file.unlink(missing_ok=True)


def _entry_file(folder: Path, file: str) -> Path:
    return (folder / file).with_suffix(".json")
