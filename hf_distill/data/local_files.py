"""Local data files, whose damage is an error that names the file and the place."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
from datasets import Features, Value, load_dataset
from datasets.exceptions import DatasetGenerationError

from ..core.references import DATASET_BUILDERS
from ..errors import DistillError

# A JSON file whose first row is no object: pyarrow crashes on null, and `datasets` takes texts for rows.
_NO_OBJECT = re.compile(rb"\s*(?:\[\s*(?:null|true|false|[-\d\"\[])|null|true|false|[-\d\"])")
_SCANNED_BYTES = 2**28  # of a broken JSON file, to name the line


def read_file(path: str, streaming: bool) -> Any:
    """The examples of a .txt, .jsonl, .json, .csv, .parquet or .arrow file; None where it has none.

    Fields of a CSV file are texts, also where they look like numbers; empty ones are missing.

    Raises:
        DistillError: there is no such file, or it cannot be read.
    """
    place, suffix = Path(path), Path(path).suffix
    if not place.is_file():
        raise DistillError(f"There is no file {path!r} (looked in {Path.cwd()}).")
    if place.stat().st_size == 0:
        return None
    with readable(path):
        if suffix == ".parquet" and pq.ParquetFile(place).metadata.num_rows == 0:
            return None
        if suffix in (".json", ".jsonl"):
            with place.open("rb") as file:
                start = file.read(1024).removeprefix(b"\xef\xbb\xbf")
                if _NO_OBJECT.match(start):
                    raise DistillError(f"{path}, row 1: found {_shown(start)}, and each row is an object, {{...}}.")
        data = load_dataset(
            DATASET_BUILDERS[suffix], data_files=path, split="train", streaming=streaming, **_options(place, suffix)
        )
        if streaming:
            return None if next(iter(data), None) is None else data
        data.data.validate(full=True)  # bytes that are no UTF-8 would fail in the middle of reading
        return data


def _options(path: Path, suffix: str) -> dict[str, Any]:
    if suffix == ".txt":
        return {"sample_by": "paragraph"}
    if suffix == ".csv":
        columns = pd.read_csv(path, nrows=0).columns
        texts = Features({str(name): Value("string") for name in columns})
        return {"features": texts, "keep_default_na": False, "na_values": [""]}
    return {}


@contextmanager
def readable(path: str) -> Iterator[None]:
    """Errors of the libraries that read a file within the block name the file, and the line where it can be found."""
    try:
        yield
    except DistillError:
        raise
    except (DatasetGenerationError, OSError, ValueError, TypeError, KeyError) as error:
        if "corresponds to no data" in str(error):
            raise DistillError(f"{path} has no documents.") from error
        cause = error.__cause__ or error
        what = Path(path).suffix or "a folder of save_to_disk"
        raise DistillError(f"{path} cannot be read as {what}: {_json_problem(path) or cause}") from error


def _shown(start: bytes) -> str:
    return repr(start.decode(errors="replace").strip()[:20])


def _json_problem(path: str) -> str | None:
    """What is wrong with a JSON file, with its line; None where it is no JSON file or nothing is found."""
    place = Path(path)
    if place.suffix not in (".json", ".jsonl"):
        return None
    with place.open("rb") as file:
        content = file.read(_SCANNED_BYTES)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        return f"line {line} is not UTF-8 (byte {content[error.start]:#04x})"
    if text.lstrip().startswith("[") and place.suffix == ".json":
        return _list_problem(text)
    for number, row_text in enumerate(text.split("\n"), 1):
        try:
            if row_text.strip() and not isinstance(row := json.loads(row_text), dict):
                return f"line {number} holds {type(row).__name__}, and each line is an object, {{...}}"
        except (ValueError, RecursionError) as error:
            return f"line {number} is not JSON: {error}"
    return None


def _list_problem(text: str) -> str | None:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is not JSON: {error}"
    except (ValueError, RecursionError) as error:
        return f"it is not JSON: {error}"
    wrong = [number for number, row in enumerate(rows, 1) if not isinstance(row, dict)]
    return f"row {wrong[0]} is no object, {{...}}" if wrong else None
