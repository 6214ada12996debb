"""Reads JSON files: values are exactly those of the file, and errors name the line.

The JSON reader of `datasets` changes values: in a column with values of several types, a text that is JSON itself ("5",
"null") is parsed, and if the types change late in a file, texts are read with their quotation marks.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import ClassVar, cast

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from datasets.features.features import generate_from_arrow_type, register_feature

from ..core.json_types import JSON, JSONObject
from ..errors import DistillError
from .checks import EXAMPLE_COLUMNS

_CHUNK_ROWS = 1_000
_BOM = b"\xef\xbb\xbf"


@dataclass
class ExactJson:
    """A column type of `datasets` for values of several types; each value is stored as its JSON text."""

    pa_type: ClassVar[pa.DataType] = pa.string()
    _type: str = field(default="ExactJson", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """Return the Arrow type of the column."""
        return self.pa_type

    def encode_example(self, value: object) -> str:
        """Return the stored JSON text of a value."""
        return json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: object = None) -> JSON:
        """Return the value of a stored JSON text."""
        return None if value is None else json.loads(value)


with warnings.catch_warnings(action="ignore", category=UserWarning):  # register_feature is marked experimental
    register_feature(ExactJson, "ExactJson")


def map_exactly(
    rows: Dataset | IterableDataset,
    function: Callable[[dict, int], dict],
    features: Features | None,
    remove_columns: Sequence[str] = (),
) -> Dataset | IterableDataset:
    """Call `rows.map` with indices and preserve the values of `ExactJson` columns, which `map` alone cannot write.

    Args:
        rows: a data set or a stream.
        function: maps an example and its index.
        features: features of the result; None: they are inferred.
        remove_columns: columns of `rows` to remove.
    """
    exact = {name for name, kind in (features or {}).items() if isinstance(kind, ExactJson)}
    if not exact or isinstance(rows, IterableDataset):
        return rows.map(function, with_indices=True, remove_columns=[*remove_columns], features=features)

    def encoded(example: dict, index: int) -> dict:
        row = {name: example[name] for name in exact if name in example} | function(example, index)
        return {name: json.dumps(value) if name in exact else value for name, value in row.items()}

    return rows.map(encoded, with_indices=True, remove_columns=[*remove_columns], features=features)


def read_json(path: str, streaming: bool) -> Dataset | IterableDataset | None:
    """Return the rows of a JSON file, a list of objects or an object on each line; None if it has no rows.

    Raises:
        DistillError: the file is malformed; the message names the line. A stream raises it when it reaches the line.
    """
    if streaming:
        rows = IterableDataset.from_generator(_stream_rows, gen_kwargs={"path": path})
        return None if next(iter(rows), None) is None else rows
    features = _features(path)
    if not features:
        return None
    state = Path(path).stat()
    version = [state.st_size, state.st_mtime_ns]  # part of the cache key of `datasets`, so that a changed file is read
    return Dataset.from_generator(_rows, features, gen_kwargs={"path": path, "version": tuple(version)})


def _rows(path: str, version: tuple[int, ...] = ()) -> Iterator[JSONObject]:
    with Path(path).open("rb") as file:
        start = file.read(1024).removeprefix(_BOM).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _list_rows(path, file.read().removeprefix(_BOM))
            return
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield _row(path, number, line.rstrip())


def _row(path: str, number: int, line: bytes) -> JSONObject:
    row = _parse(path, number, line)
    if not isinstance(row, dict):
        raise _unreadable(path, f"line {number} holds {_type_name(row)}, but each line must be an object, {{...}}")
    return row


def _list_rows(path: str, content: bytes) -> list[JSONObject]:
    rows = cast(list[JSONObject], _parse(path, 1, content))
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            problem = f"row {index} (counted from 0) holds {_type_name(row)}, but each row must be an object, {{...}}"
            raise _unreadable(path, problem)
    return rows


def _parse(path: str, first_line: int, content: bytes) -> JSON:
    try:
        value = json.loads(content.decode())
        if b"\\ud" in content or b"\\uD" in content:
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
        return value
    except json.JSONDecodeError as error:
        line, problem = first_line + error.lineno - 1, f"is not JSON: {error.msg} (column {error.colno})"
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        problem = f"is not UTF-8 (byte {content[error.start]:#04x})"
    except UnicodeEncodeError as error:
        line, problem = first_line, f"holds half of a surrogate pair ({error.object[error.start]!r}), which is no text"
    except (ValueError, RecursionError) as error:  # a number with too many digits, too many brackets
        line, problem = first_line, f"is not JSON: {error}"
    raise _unreadable(path, f"line {line} {problem}")


def _unreadable(path: str, problem: str) -> DistillError:
    return DistillError(
        f"{path} cannot be read as {Path(path).suffix}: {problem}. A JSON file must hold a list of objects, or an "
        "object on each line."
    )


def _type_name(value: object) -> str:
    return "null" if value is None else type(value).__name__


def _chunks(rows: Iterator[JSONObject]) -> Iterator[list[JSONObject]]:
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        yield chunk


def _features(path: str) -> Features:
    """Return the types of the columns; `ExactJson` for a column whose values have several types."""
    types: dict[str, pa.DataType | None] = {}
    for chunk in _chunks(_rows(path)):
        for name in dict.fromkeys(name for row in chunk for name in row):
            types[name] = _common_type(types.get(name, pa.null()), [row.get(name) for row in chunk])
    return Features(
        {name: ExactJson() if kind is None else generate_from_arrow_type(kind) for name, kind in types.items()}
    )


def _common_type(known: pa.DataType | None, values: list[JSON]) -> pa.DataType | None:
    if known is None:
        return None
    try:
        schemas = [pa.schema({"column": kind}) for kind in (known, pa.array(values).type)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def _stream_rows(path: str) -> Iterator[JSONObject]:
    """Yield rows with the columns of the first chunk, null where a row lacks one: the columns of a stream are fixed."""
    columns: dict[str, None] = {}
    for number, chunk in enumerate(_chunks(_rows(path))):
        columns = columns or dict.fromkeys(name for row in chunk for name in row)
        for index, row in enumerate(chunk, number * _CHUNK_ROWS):
            if new_columns := [name for name in row if name not in columns and name in EXAMPLE_COLUMNS]:
                raise DistillError(
                    f"{path}, row {index} (counted from 0), has the column {new_columns[0]}, which none of the first "
                    f"{_CHUNK_ROWS:,} rows has. Add it to an earlier row with the value null, or turn streaming off."
                )
            if columns:
                yield {name: row.get(name) for name in columns}
