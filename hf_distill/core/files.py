"""Atomic writes, sizes and checksums of files. Imports no torch."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

from ..errors import DistillError


class FileEntry(TypedDict):
    """A file in the manifest of a cache: its name, size in bytes and checksum."""

    file: str
    bytes: int
    sha256: str


class ShardEntry(FileEntry):
    """A shard in the manifest of a cache, with its numbers of examples and target tokens."""

    examples: int
    tokens: int


@contextmanager
def atomic_path(path: Path, suffix: str = "half") -> Iterator[Path]:
    """Yield a temporary path for a file or folder, which is renamed to `path` when the block ends without an error.

    A file is flushed to the disk first: after a crash or a power failure it has the old or the new content.

    Args:
        path: file, or a folder that does not exist.
        suffix: of the temporary path; processes that may write the same path at the same time need different ones.
    """
    temporary = path.with_name(f"{path.name}.{suffix}")
    try:
        yield temporary
        if temporary.is_file():
            flush(temporary)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink(missing_ok=True)
        raise


def check_writable(folder: Path) -> None:
    """Check that files can be written into a folder, or that it can be created, before long work. Leaves nothing.

    Raises:
        DistillError: the folder or a parent is a file, or may not be written to.
    """
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise DistillError(f"{folder} cannot be written to ({error.strerror}): give another folder.") from error


def write_atomic(path: Path, text: str) -> None:
    """Write a text file atomically; see `atomic_path`."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_entry(file: Path) -> FileEntry:
    """Return the entry of a file in a manifest: name, size and checksum."""
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": digest}


def file_error(folder: Path, entry: FileEntry) -> str | None:
    """Compare a file of a cache with its entry in the manifest; return the error message, or None if it is intact."""
    file = folder / entry["file"]
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{file} is damaged: it has {size} bytes instead of {entry['bytes']}"
    return f"{file} is damaged: its checksum differs" if file_entry(file)["sha256"] != entry["sha256"] else None


def check_files(folder: Path, *entries: FileEntry) -> None:
    """Refuse missing or damaged files of a cache.

    Raises:
        DistillError: files are missing or damaged; the message names all of them.
    """
    if errors := [error for entry in entries if (error := file_error(folder, entry))]:
        raise DistillError(f"{'; '.join(errors)}. Write the cache again, or copy these files from the original again.")


def checksum_of(values: Mapping[str, object]) -> str:
    """Return a checksum of the content of a JSON file, independent of the order of keys."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
