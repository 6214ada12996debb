"""Shards of a cache: memory-mapped Arrow files of examples, looked up by key and verified before use."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..core.files import FileEntry, ShardEntry, check_files, file_entry
from .example_keys import KEY_BYTES
from .manifest import INDEX, Manifest, atomic_cache_file, read_manifest


@dataclass(frozen=True)
class CachedExample:
    """The stored signals of one example.

    tokens:  T, the number of target tokens
    ids:     number of stored ids of all target tokens; 0 for hidden states
    payload: bytes of the codec; for hidden states the bytes of [T, H]
    layers:  bytes of the hidden states [T, H] of each further layer, in the order of the manifest
    """

    tokens: int
    ids: int
    payload: bytes | pa.Buffer
    layers: list[bytes | pa.Buffer]

    def in_memory(self) -> "CachedExample":
        """Return a copy that does not refer to a memory-mapped file, so that using it reads nothing from the disk."""
        return CachedExample(self.tokens, self.ids, bytes(self.payload), [bytes(layer) for layer in self.layers])


def schema_of(layers: Sequence[int]) -> pa.Schema:
    """Return the schema of a shard; `datasets` can read it with load_dataset("arrow", data_files=...)."""
    columns = [
        ("key", pa.binary(KEY_BYTES)),
        ("tokens", pa.int32()),
        ("ids", pa.int32()),
        ("payload", pa.large_binary()),
    ]
    return pa.schema([*columns, *((f"hidden_{layer}", pa.large_binary()) for layer in layers)])


def write_shard(
    file: Path, keys: Sequence[bytes], stored: Sequence[CachedExample], layers: Sequence[int]
) -> ShardEntry:
    """Write a shard atomically.

    Returns:
        the entry of the shard in the manifest.

    Raises:
        DistillError: the disk is full or not writable.
    """
    columns = [
        list(keys),
        [example.tokens for example in stored],
        [example.ids for example in stored],
        [example.payload for example in stored],
    ]
    columns += [[example.layers[i] for example in stored] for i in range(len(layers))]
    schema = schema_of(layers)
    arrays = [pa.array(values, type=kind.type) for values, kind in zip(columns, schema, strict=True)]
    with atomic_cache_file(file) as temporary, temporary.open("wb") as out, pa.ipc.new_stream(out, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    return {**file_entry(file), "examples": len(keys), "tokens": sum(example.tokens for example in stored)}


class CacheReader:
    """Looks up examples of a cache by key.

    A shard is verified when a process first reads from it, and is memory-mapped afterwards. The keys are kept in
    memory: 24 bytes per example.

    Raises:
        DistillError: the folder is not a complete cache; a shard is missing or damaged.
    """

    def __init__(self, folder: Path):
        self.folder, self.manifest = folder, read_manifest(folder)
        self._tables: dict[int, pa.Table] = {}
        self._index: tuple[np.ndarray, np.ndarray] | None = None

    def get(self, keys: Sequence[bytes]) -> list[CachedExample | None]:
        """Return the stored signals of each key; None for a key that the cache does not contain."""
        if self._index is None:
            self._index = self._sorted_keys()
        sorted_keys, locations = self._index
        dtype = f"V{KEY_BYTES}"
        requested = np.frombuffer(b"".join(keys), dtype=dtype) if keys else np.empty(0, dtype=dtype)
        starts = np.searchsorted(sorted_keys, requested.view("<u8")[::2])
        return [self._find(key, int(i), sorted_keys, locations) for key, i in zip(keys, starts, strict=True)]

    def _find(self, key: bytes, i: int, sorted_keys: np.ndarray, locations: np.ndarray) -> CachedExample | None:
        first_half = int.from_bytes(key[:8], "little")
        while i < len(sorted_keys) and sorted_keys[i] == first_half:
            shard, row = locations[i].tolist()
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
        """Return the sorted first halves of all keys, and the location [shard, row] of each."""
        assert self.manifest.index is not None
        check_files(self.folder, self.manifest.index)
        first_halves = np.fromfile(self.folder / INDEX, dtype="<u8")[::2]
        counts = [shard["examples"] for shard in self.manifest.shards]
        shards, rows = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])
        order = np.argsort(first_halves, kind="stable")
        return first_halves[order], np.stack([shards, rows], 1)[order]


def write_index(folder: Path, shards: Sequence[ShardEntry]) -> FileEntry:
    """Write the keys of all shards into one file and return the entry of that file in the manifest."""
    with atomic_cache_file(folder / INDEX) as temporary, temporary.open("wb") as out:
        for shard in shards:
            with pa.ipc.open_stream(pa.memory_map(str(folder / shard["file"]))) as reader:
                out.write(b"".join(reader.read_all()["key"].to_pylist()))
    return file_entry(folder / INDEX)


def verify_cache(folder: Path) -> Manifest:
    """Verify every file of a cache by its size and digest.

    Args:
        folder: folder of the cache.

    Returns:
        the manifest.

    Raises:
        DistillError: files are missing or damaged; the message names all of them.
    """
    manifest = read_manifest(folder)
    check_files(folder, *manifest.files)
    return manifest
