"""Files of a cache: atomic writes, sizes and checksums."""

import hashlib
import json
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
def atomic_path(file: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, which is renamed to the file when the block ends.

    Raises:
        DistillError: the disk is full or not writable; the temporary file is removed then.
    """
    temporary = file.with_name(f"{file.name}.half")
    try:
        yield temporary
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DistillError(
            f"{file} cannot be written ({error.strerror or error}). The files written before it are complete: free "
            "disk space and run the same command again, which resumes there."
        ) from error


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
