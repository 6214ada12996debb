"""SHA-256 of the rows of a data set, which results.json and checkpoints record."""

import hashlib
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
from datasets import Dataset

_BATCH_ROWS = 1_000


class _Digest(Protocol):
    def update(self, data: bytes, /) -> None: ...


def fingerprint_of(rows: Dataset) -> str:
    """Return the SHA-256 of the rows in order.

    Of rows of a language model these are the token ids and lengths; labels follow from them. Of other rows these are
    all columns. An image or a recording in a file of its own counts with the name and the size of the file.
    """
    digest = hashlib.sha256()
    columns = ["input_ids"] if _is_of_language_model(rows) else sorted(rows.column_names)
    for batch in rows.select_columns(columns).with_format("arrow").iter(_BATCH_ROWS):
        for name in columns:
            _add(digest, batch[name].combine_chunks())
    return digest.hexdigest()


def _is_of_language_model(rows: Dataset) -> bool:
    return "input_ids" in rows.column_names and hasattr(rows.features["labels"], "feature")


def _add(digest: _Digest, array: Any) -> None:
    """Add the values of an Arrow array."""
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_struct(array.type):
        names = [field.name for field in array.type]
        if {*names} == {"bytes", "path"}:
            _add_files(digest, array)
        else:
            for child in array.flatten():
                _add(digest, child)
    elif pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(array.value_lengths().fill_null(-1).to_numpy().astype("<i8").tobytes())
        _add(digest, array.flatten())
    elif pa.types.is_integer(array.type) and not array.null_count:
        digest.update(array.to_numpy().astype("<i8").tobytes())
    elif pa.types.is_floating(array.type) and not array.null_count:
        digest.update(array.to_numpy().astype("<f8").tobytes())
    else:
        digest.update(repr(array.to_pylist()).encode())


def _add_files(digest: _Digest, array: pa.StructArray) -> None:
    for file in array.to_pylist():
        if file is None or file["bytes"] is not None:
            digest.update(b"" if file is None else file["bytes"])
        else:
            path = Path(file["path"])
            digest.update(f"{path.name} {path.stat().st_size if path.is_file() else -1}".encode())
