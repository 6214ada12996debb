"""Shards: Arrow files of examples, memory-mapped, found by key, checked before anything in them is used."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from .example_keys import KEY
from .files import atomic_path, check_files, file_entry
from .manifest import INDEX, Manifest, read_manifest


@dataclass(frozen=True)
class CachedExample:
    """What a cache has of one example.

    tokens:  T of it
    ids:     how many ids its tokens have together; 0 of hidden states
    payload: of the codec; of hidden states [T, H]
    layers:  of further layers, [T, H] each, in the manifest's order
    """

    tokens: int
    ids: int
    payload: Any
    layers: list[Any]


def schema_of(layers: Sequence[int]) -> pa.Schema:
    """Columns of a shard; `datasets` reads them too: load_dataset("arrow", data_files=...)."""
    columns = [("key", pa.binary(KEY)), ("tokens", pa.int32()), ("ids", pa.int32()), ("payload", pa.large_binary())]
    return pa.schema([*columns, *((f"hidden_{layer}", pa.large_binary()) for layer in layers)])


def write_shard(
    file: Path, keys: Sequence[bytes], stored: Sequence[CachedExample], layers: Sequence[int]
) -> dict[str, Any]:
    """Write a shard whole or not at all.

    Returns:
        its entry in the manifest.

    Raises:
        DistillError: the disk is full, or cannot be written.
    """
    columns = [list(keys), [s.tokens for s in stored], [s.ids for s in stored], [s.payload for s in stored]]
    columns += [[s.layers[i] for s in stored] for i in range(len(layers))]
    schema = schema_of(layers)
    arrays = [pa.array(values, type=kind.type) for values, kind in zip(columns, schema, strict=True)]
    with atomic_path(file) as half, half.open("wb") as out:
        with pa.ipc.new_stream(out, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        out.flush()
        os.fsync(out.fileno())
    return file_entry(file) | {"examples": len(keys), "tokens": sum(s.tokens for s in stored)}


class CacheReader:
    """A cache's examples by key.

    A shard is checked when something of it is needed for the first time in a process, and mapped into memory from then
    on. Keys are held in memory: 24 bytes an example.

    Raises:
        DistillError: the folder is no whole cache; a shard is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self._tables: dict[int, pa.Table] = {}
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def get(self, keys: Sequence[bytes]) -> list[CachedExample | None]:
        """What there is of examples; None where there is nothing."""
        if self._index is None:
            self._index = self._sorted_keys()
        known, places = self._index
        wanted = np.frombuffer(b"".join(keys), dtype=f"V{KEY}") if keys else np.empty(0, dtype=f"V{KEY}")
        at = np.searchsorted(known, wanted.view("<u8")[::2])
        return [self._at(key, int(i), known, places) for key, i in zip(keys, at, strict=True)]

    def _at(self, key: bytes, i: int, known: np.ndarray, places: np.ndarray) -> CachedExample | None:
        first = int.from_bytes(key[:8], "little")
        while i < len(known) and known[i] == first:
            shard, row = places[i].tolist()
            table = self._table(shard)
            if table["key"][row].as_py() == key:
                return self._read(table, row)
            i += 1
        return None

    def _read(self, table: pa.Table, row: int) -> CachedExample:
        layers = [table[f"hidden_{layer}"][row].as_buffer() for layer in self.manifest.options.get("layers", ())]
        return CachedExample(
            table["tokens"][row].as_py(), table["ids"][row].as_py(), table["payload"][row].as_buffer(), layers
        )

    def _table(self, shard: int) -> pa.Table:
        if shard not in self._tables:
            entry = self.manifest.shards[shard]
            check_files(self.folder, entry)
            with pa.ipc.open_stream(pa.memory_map(str(self.folder / entry["file"]))) as reader:
                self._tables[shard] = reader.read_all()
        return self._tables[shard]

    def _sorted_keys(self) -> tuple[np.ndarray, np.ndarray]:
        """First halves of all keys in order, and [shard, row] of each."""
        assert self.manifest.index is not None
        check_files(self.folder, self.manifest.index)
        first = np.fromfile(self.folder / INDEX, dtype="<u8")[::2]
        counts = [shard["examples"] for shard in self.manifest.shards]
        places = np.stack(
            [np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])], 1
        )
        order = np.argsort(first, kind="stable")
        return first[order], places[order]


def write_index(folder: Path, shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Write the keys of all shards into one file; its entry in the manifest."""
    with atomic_path(folder / INDEX) as half, half.open("wb") as out:
        for shard in shards:
            with pa.ipc.open_stream(pa.memory_map(str(folder / shard["file"]))) as reader:
                out.write(b"".join(reader.read_all()["key"].to_pylist()))
    return file_entry(folder / INDEX)


def verify_cache(folder: Path) -> Manifest:
    """Check every file of a cache, and return its manifest.

    Raises:
        DistillError: files are missing, cut off or damaged; all of them are named.
    """
    manifest = read_manifest(folder)
    check_files(folder, *manifest.files)
    return manifest
