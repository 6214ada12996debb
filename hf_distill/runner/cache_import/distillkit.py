"""Reads the data sets of log-probabilities that DistillKit writes (arcee-ai/DistillKit, March 2026).

A row has `input_ids` [S] and the k most probable ids of each position, most probable first, in one of three forms:

- `bytepacked_indices` and `compressed_logprobs`, with a `logprob_compressor` (`Quantization`);
- `packed_indices`, `exact_values` and `coeffs`, with a `legacy_logit_compression` (`LegacyQuantization`);
- `token_ids` and `top_values`, uncompressed.

Position i has the distribution of token i + 1. The last position is missing, unless a token was added to the text.
`pack_logits` numbers the texts of a packed row in its `attention_mask`.
"""

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from datasets import Dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pydantic import TypeAdapter, ValidationError

from ...core.files import file_entry
from ...errors import DistillError
from ...recipe.safe_yaml import read_yaml
from .distillkit_codec import LegacyQuantization, Quantization
from .records import Location, Provenance, TokenRecord

CONFIG_FILE = "compression_config.yaml"  # which DistillKit writes next to the data
_SECTIONS = ("logprob_compressor", "legacy_logit_compression")


class DistillKitFile:
    """A data set of DistillKit: Parquet files, or a folder of `Dataset.save_to_disk`.

    Args:
        path: a Parquet file, a folder of Parquet files, or a folder of `save_to_disk`.
        config: YAML file with the compression, or None: `compression_config.yaml` in the folder of the data.

    A location is (row, index of the text in a packed row).

    Raises:
        DistillError: there are no rows, the columns are not those of the format, or the compression is not known.
    """

    def __init__(self, path: Path, config: Path | None = None):
        self.path, self._files = path, [path]
        if path.is_dir():
            self._files = sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow"))
        if not self._files:
            raise DistillError(
                f"{path} has no Parquet or Arrow files: pass the data, such as the folder of DistillKit."
            )
        try:
            if self._files[0].suffix == ".arrow":
                self._rows = load_from_disk(str(path))
            else:
                self._rows = Dataset.from_parquet([str(file) for file in self._files])
        except (DatasetsError, pa.ArrowException, OSError, ValueError, TypeError, KeyError) as error:
            reason = f"{type(error.__cause__ or error).__name__}: {error.__cause__ or error}"
            raise DistillError(f"{path} cannot be read as a data set of DistillKit ({reason}).") from None
        if not isinstance(self._rows, Dataset):
            raise DistillError(f"{path} has several splits: pass the folder of one of them.")
        self._columns = self._value_columns(self._rows.column_names)
        self._config = self._load_config(config)
        names = ["input_ids", *self._columns, *({"attention_mask"} & {*self._rows.column_names})]
        self._rows = self._rows.select_columns(names).with_format("arrow")

    def provenance(self) -> Provenance:
        """Return the entries of the files, and the compression."""
        compression = None if self._config is None else self._config.model_dump(mode="json")
        return Provenance("distillkit", [file_entry(file) for file in self._files], {"compression": compression})

    def records(self) -> Iterator[tuple[Location, TokenRecord]]:
        """Yield the records of all rows."""
        for row in range(len(self._rows)):
            for index, record in enumerate(self._texts(row)):
                yield (row, index), record

    def read(self, location: Location) -> TokenRecord:
        """Return the record at a location."""
        row, index = location
        return self._texts(row)[index]

    def _value_columns(self, columns: list[str]) -> tuple[str, ...]:
        forms = (
            ("bytepacked_indices", "compressed_logprobs"),
            ("packed_indices", "exact_values", "coeffs"),
            ("token_ids", "top_values"),
        )
        value_columns = next((form for form in forms if {*form} <= {*columns}), None)
        if value_columns is None or "input_ids" not in columns:
            needed = "; or ".join(", ".join(form) for form in forms)
            raise DistillError(
                f"{self.path} has the columns {', '.join(columns)}. Log-probabilities of DistillKit have input_ids and "
                f"{needed}."
            )
        return value_columns

    def _load_config(self, file: Path | None) -> Quantization | LegacyQuantization | None:
        """Return the compression of the rows: a file of its fields, or of a run of DistillKit that uses the data."""
        if "token_ids" in self._columns:
            return None
        folder = self.path if self.path.is_dir() else self.path.parent
        is_legacy = "coeffs" in self._columns
        file = file or folder / CONFIG_FILE
        if not file.is_file():
            raise DistillError(
                f"The compression of {self.path} is not known, because {file} does not exist. Pass --compression FILE: "
                f"a YAML file with the fields of `{_SECTIONS[is_legacy]}`, as DistillKit's configuration has them."
            )
        try:
            values = read_yaml(file.read_text(), str(file))
        except UnicodeDecodeError:
            raise DistillError(f"{file} is no YAML file: it is not UTF-8.") from None
        for holder in (values, values.get("teacher") if isinstance(values, Mapping) else None):
            values = holder.get(_SECTIONS[is_legacy], values) if isinstance(holder, Mapping) else values
        try:
            return (
                TypeAdapter(LegacyQuantization).validate_python(values)
                if is_legacy
                else TypeAdapter(Quantization).validate_python(values)
            )
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, each['loc'])) or 'the file'}: {each['msg']}" for each in error.errors()
            )
            raise DistillError(f"{file} is no `{_SECTIONS[is_legacy]}` of DistillKit: {problems}.") from None

    def _texts(self, row: int) -> list[TokenRecord]:
        """Return the records of a row: one, or one for each text of a packed row."""
        where = f"{self.path}, row {row} (counted from 0)"
        table = self._rows[row]
        tokens = _numbers(table["input_ids"], where, "input_ids")
        columns = [_matrix(table[name], where, name) for name in self._columns]
        if len({len(column) for column in columns}) > 1:
            raise DistillError(f"{where} has columns of different lengths: {', '.join(self._columns)}.")
        try:
            ids, values = columns if self._config is None else self._config.decode(*columns)
        except DistillError as error:
            raise DistillError(f"{where} {error}: is it the compression with which the data was written?") from None
        mask = np.ones_like(tokens)
        if "attention_mask" in table.column_names:
            mask = _numbers(table["attention_mask"], where, "attention_mask")
        if len(mask) != len(tokens):
            raise DistillError(f"{where} has an attention_mask of {len(mask)} for {len(tokens)} input_ids.")
        if not len(tokens) - 1 <= len(ids) <= len(tokens):
            raise DistillError(
                f"{where} has log-probabilities of {len(ids)} positions and {len(tokens)} input_ids. A row needs as "
                "many, or one less."
            )
        edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(tokens)]
        k = ids.shape[1]
        return [
            TokenRecord(
                where,
                tokens[start:end],
                ids[start:end].astype(np.int64),
                values[start:end].astype(np.float64),
                min_k=k,
                max_k=k,
                is_approximate=True,
            )
            for start, end in pairwise(edges)
            if start < end and mask[start]
        ]


def _numbers(column: pa.ChunkedArray, where: str, name: str) -> np.ndarray:
    """Return the integers of a list in the only row of a column."""
    if not hasattr(column.combine_chunks(), "value_lengths"):
        raise DistillError(f"{where} has {name} of type {column.type}, and must have a list.")
    return _flat(column.combine_chunks(), where, name).astype(np.int64)


def _matrix(column: pa.ChunkedArray, where: str, name: str) -> np.ndarray:
    """Return a list of lists of equal lengths, in the only row of a column, as a matrix [P, numbers]."""
    lists = column.combine_chunks()
    lists = lists.flatten() if hasattr(lists, "value_lengths") else lists
    if not hasattr(lists, "value_lengths"):
        raise DistillError(
            f"{where} has {name} of type {column.type}, and must have a list of numbers for each position."
        )
    flat = _flat(lists, where, name)
    widths = np.unique(lists.value_lengths().to_numpy(zero_copy_only=False))
    if len(widths) > 1:
        raise DistillError(f"{where} has lists of {widths[0]} to {widths[-1]} numbers in {name}; all need one length.")
    return flat.reshape(len(lists), int(widths[0]) if len(widths) else 0)


def _flat(lists: pa.ListArray, where: str, name: str) -> np.ndarray:
    """Return the numbers of lists, one after the other."""
    values = lists.flatten()
    if lists.null_count or values.null_count:
        raise DistillError(f"{where} has null in {name}.")
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise DistillError(f"{where} has {values.type} in {name}, and must have numbers.")
    return values.to_numpy(zero_copy_only=False)
