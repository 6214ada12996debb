"""Reads local data files; an error names the damaged file and, where possible, the line or row."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Value, load_dataset
from datasets.exceptions import DatasetsError

from ..core.references import DATASET_BUILDERS
from ..errors import DistillError
from .json_files import read_json


def read_file(path: str, streaming: bool) -> Dataset | IterableDataset | None:
    """Return the examples of a .txt, .jsonl, .json, .csv, .parquet or .arrow file; None if it has no examples.

    Fields of a CSV file are texts, also if they look like numbers; empty fields are None.

    Raises:
        DistillError: the file does not exist or cannot be read.
    """
    file, suffix = Path(path), Path(path).suffix
    if not file.is_file():
        raise DistillError(f"There is no file {path!r} (the working directory is {Path.cwd()}).")
    if file.stat().st_size == 0:
        return None
    with readable(path):
        if suffix in (".json", ".jsonl"):
            return read_json(path, streaming)
        if suffix == ".parquet" and pq.ParquetFile(file).metadata.num_rows == 0:
            return None
        if streaming:
            rows = IterableDataset.from_generator(_stream, gen_kwargs={"path": path})
            return None if next(iter(rows), None) is None else rows
        data = cast(Dataset, _load(path, streaming))
        data.data.validate(full=True)  # otherwise bytes that are not UTF-8 fail in the middle of training
        return data


def read_generated(folder: Path, streaming: bool) -> Dataset | IterableDataset:
    """Return the examples of a data set of `hf-distill generate`.

    Its files are read by name: `datasets` recognizes a folder with a card by the names of its files only, and would
    return the rows of an earlier data set from its cache.

    Raises:
        DistillError: the data set is unfinished, or a file cannot be read.
    """
    files = sorted(str(file) for file in (folder / "data").glob("*.parquet"))
    if not files:
        raise DistillError(
            f"{folder} is an unfinished data set of `hf-distill generate`: run that command with --resume first."
        )
    with readable(files[0]):
        data = load_dataset("parquet", data_files=files, split="train", streaming=streaming)
    return cast(Dataset | IterableDataset, data)


def _load(path: str, streaming: bool) -> Dataset | IterableDataset:
    suffix = Path(path).suffix
    options = _options(Path(path), suffix)
    rows = load_dataset(DATASET_BUILDERS[suffix], data_files=path, split="train", streaming=streaming, **options)
    return cast(Dataset | IterableDataset, rows)


def _stream(path: str) -> Iterator[dict]:
    """Yield the rows of a file; an error that occurs late in the file names the file too."""
    with readable(path):
        rows = iter(_load(path, True))
    while True:
        with readable(path):
            row = next(rows, None)
        if row is None:
            return
        yield row


def _options(path: Path, suffix: str) -> dict[str, Any]:
    if suffix == ".txt":
        return {"sample_by": "paragraph"}
    if suffix == ".csv":
        columns = pd.read_csv(path, nrows=0).columns
        if len(columns) == 1 and re.search(r"\w\s*[;\t|]\s*\w", columns[0]):
            raise DistillError(
                f"{path} has one column, {columns[0]!r}: fields of a CSV file must be separated by commas. Write the "
                "file with commas."
            )
        texts = Features({str(name): Value("string") for name in columns})
        return {"features": texts, "keep_default_na": False, "na_values": [""]}
    return {}


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Turn errors of the libraries that read a file within the block into a DistillError that names the file.

    The libraries' own log lines of these errors are suppressed.
    """
    suffix = Path(path).suffix
    log = logging.getLogger("datasets.packaged_modules.{0}.{0}".format(DATASET_BUILDERS.get(suffix, "arrow")))
    log.addFilter(_is_no_repeated_error)
    try:
        yield
    except DistillError:
        raise
    except (DatasetsError, pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
        if "corresponds to no data" in str(error):
            raise DistillError(f"{path} has no documents.") from error
        cause = error.__cause__ or error
        what = suffix or "a folder of save_to_disk"
        raise DistillError(f"{path} cannot be read as {what}: {cause}") from error
    finally:
        log.removeFilter(_is_no_repeated_error)


def _is_no_repeated_error(record: logging.LogRecord) -> bool:
    """Return False for the log line that `datasets` writes before it raises the same error."""
    return not str(record.msg).startswith("Failed to ")
