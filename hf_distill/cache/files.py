"""Files of a cache: written whole or not at all, known by size and checksum."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import DistillError


@contextmanager
def atomic_path(file: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes the file when the block ends.

    Raises:
        DistillError: the disk is full, or cannot be written; nothing is left of the file then.
    """
    half = file.with_name(f"{file.name}.half")
    try:
        yield half
        half.replace(file)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise DistillError(
            f"{file} cannot be written ({error.strerror or error}). What was written before it is whole: make room and "
            "run the same command again, which goes on from there."
        ) from error


def file_entry(file: Path) -> dict[str, Any]:
    """By what a manifest knows a file."""
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return {"file": file.name, "bytes": file.stat().st_size, "sha256": digest}


def file_error(folder: Path, entry: dict[str, Any]) -> str | None:
    """What is wrong with a file of a cache, by its entry in the manifest; None: nothing is."""
    file = folder / entry["file"]
    if not file.is_file():
        return f"{file} is missing"
    if (size := file.stat().st_size) != entry["bytes"]:
        return f"{file} is cut off or longer, {size} bytes in the place of {entry['bytes']}"
    return f"{file} is damaged, for its checksum differs" if file_entry(file)["sha256"] != entry["sha256"] else None


def check_files(folder: Path, *entries: dict[str, Any]) -> None:
    """Refuse files of a cache that are not what was written.

    Raises:
        DistillError: names all of them.
    """
    if found := [damage for entry in entries if (damage := file_error(folder, entry))]:
        raise DistillError(f"{'; '.join(found)}: write the cache again, or get these files from where it came from.")


def checksum_of(values: Mapping[str, Any]) -> str:
    """A checksum of what a JSON file says, wherever its keys stand."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
