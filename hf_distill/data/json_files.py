"""JSON files: values are kept exactly as the file has them, and errors name the line.

The JSON reader of `datasets` changes values: in a column with values of several types, a text that is JSON itself ("5",
"null") becomes that JSON, and where the types change late in a file, texts are read with their quotation marks.
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from datasets.features.features import generate_from_arrow_type, register_feature

from ..errors import DistillError
from .checks import EXAMPLE_COLUMNS

_CHUNK_ROWS = 1_000
_BOM = b"\xef\xbb\xbf"


@dataclass
class ExactJson:
    """A column of `datasets` whose values have several types; each is stored as the JSON that it is written as."""

    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="ExactJson", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """How Arrow stores the column."""
        return self.pa_type

    def encode_example(self, value: Any) -> str:
        """A value as it is stored."""
        return json.dumps(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """A value as it was."""
        return None if value is None else json.loads(value)


with warnings.catch_warnings(action="ignore", category=UserWarning):  # register_feature is marked experimental
    register_feature(ExactJson, "ExactJson")


def map_exactly(
    rows: Any, function: Callable[[dict, int], dict], features: Features | None, remove_columns: Sequence[str] = ()
) -> Any:
    """`rows.map` with indices, whose result keeps the values of `ExactJson` columns, which `map` alone cannot write.

    Args:
        rows: a data set or a stream.
        function: of an example and its index.
        features: of the result; None: inferred.
        remove_columns: of `rows`.
    """
    exact = {name for name, kind in (features or {}).items() if isinstance(kind, ExactJson)}
    if not exact or isinstance(rows, IterableDataset):
        return rows.map(function, with_indices=True, remove_columns=[*remove_columns], features=features)

    def encoded(example: dict, index: int) -> dict:
        row = {name: example[name] for name in exact if name in example} | function(example, index)
        return {name: json.dumps(value) if name in exact else value for name, value in row.items()}

    return rows.map(encoded, with_indices=True, remove_columns=[*remove_columns], features=features)


def read_json(path: str, streaming: bool) -> Dataset | IterableDataset | None:
    """The rows of a JSON file: a list of objects, or an object on each line; None where it has none.

    Raises:
        DistillError: it is no such file, with the line; of a stream, what stands later is an error when it is read.
    """
    if streaming:
        rows = IterableDataset.from_generator(_rows_of_equal_columns, gen_kwargs={"path": path})
        return None if next(iter(rows), None) is None else rows
    features = _features(path)
    if not features:
        return None
    state = Path(path).stat()
    version = [state.st_size, state.st_mtime_ns]  # part of the key under which `datasets` keeps what was read
    return Dataset.from_generator(_rows, features, gen_kwargs={"path": path, "version": tuple(version)})


def _rows(path: str, version: tuple[int, ...] = ()) -> Iterator[dict[str, Any]]:
    with Path(path).open("rb") as file:
        start = file.read(1024).removeprefix(_BOM).lstrip()
        file.seek(0)
        if start.startswith(b"["):
            yield from _rows_of_list(path, file.read().removeprefix(_BOM))
            return
        for number, line in enumerate(file, 1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line.strip():
                yield _row(path, number, line.rstrip())


def _row(path: str, number: int, line: bytes) -> dict[str, Any]:
    row = _parsed(path, number, line)
    if not isinstance(row, dict):
        raise _unreadable(path, f"line {number} holds {_type_name(row)}, and each line is an object, {{...}}")
    return row


def _rows_of_list(path: str, content: bytes) -> list[dict[str, Any]]:
    rows = _parsed(path, 1, content)
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            problem = f"row {index} (counted from 0) holds {_type_name(row)}, and each row is an object, {{...}}"
            raise _unreadable(path, problem)
    return rows


def _parsed(path: str, first_line: int, content: bytes) -> Any:
    try:
        value = json.loads(content.decode())
        if b"\\ud" in content or b"\\uD" in content:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
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
        f"{path} cannot be read as {Path(path).suffix}: {problem}. A JSON file holds a list of objects, or an object "
        "on each line."
    )


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        yield chunk


def _features(path: str) -> Features:
    """The types of the columns; `ExactJson` where the values of one have several."""
    types: dict[str, pa.DataType | None] = {}
    for chunk in _chunks(_rows(path)):
        for name in dict.fromkeys(name for row in chunk for name in row):
            types[name] = _common_type(types.get(name, pa.null()), [row.get(name) for row in chunk])
    return Features({name: ExactJson() if t is None else generate_from_arrow_type(t) for name, t in types.items()})


def _common_type(known: pa.DataType | None, values: list[Any]) -> pa.DataType | None:
    if known is None:
        return None
    try:
        schemas = [pa.schema({"column": kind}) for kind in (known, pa.array(values).type)]
        return pa.unify_schemas(schemas, promote_options="permissive").field("column").type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return None


def _rows_of_equal_columns(path: str) -> Iterator[dict[str, Any]]:
    """Rows with the columns of the first chunk's rows, null where one lacks it, as a stream's columns stay the same."""
    columns: dict[str, None] = {}
    for number, chunk in enumerate(_chunks(_rows(path))):
        columns = columns or dict.fromkeys(name for row in chunk for name in row)
        for index, row in enumerate(chunk, number * _CHUNK_ROWS):
            if late := [name for name in row if name not in columns and name in EXAMPLE_COLUMNS]:
                raise DistillError(
                    f"{path}, row {index} (counted from 0), has the column {late[0]}, which none of the first "
                    f"{_CHUNK_ROWS:,} rows has. Write it into an earlier row too, as null, or leave streaming out."
                )
            if columns:
                yield {name: row.get(name) for name in columns}
