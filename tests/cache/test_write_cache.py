"""An interrupted write of a cache is resumed; errors name the damaged files."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from tiny import build, collate, rows

from hf_distill import DistillError
from hf_distill.cache import CacheReader, open_cache, read_manifest, verify_cache, write_cache
from hf_distill.core import files
from hf_distill.core.locks import LOCK_FILE


def teacher():
    return build("llama", 1, layers=3, width=48)


def write_test_cache(folder, kind="sampled", data=None, **options):
    data = rows("llama", 40) if data is None else data
    arguments = {"collator": collate, "batch_size": 4, "shard_rows": 8} | options
    return write_cache(folder, teacher(), data, kind=kind, **arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != LOCK_FILE}


@pytest.mark.parametrize("kind", ["hidden", "sampled", "top_k"])
def test_a_cache_is_complete_and_readable_by_datasets(tmp_path, kind):
    from datasets import load_dataset

    manifest = write_test_cache(tmp_path / "cache", kind)
    assert manifest == read_manifest(tmp_path / "cache") == verify_cache(tmp_path / "cache")
    head = ["head.safetensors"] if kind == "hidden" else []
    total = sum(f.stat().st_size for f in (tmp_path / "cache").iterdir() if f.name not in ("manifest.json", LOCK_FILE))
    assert manifest.size == total > manifest.payload
    names = {"manifest.json", "index.bin", *(shard["file"] for shard in manifest.shards), *head}
    assert content(tmp_path / "cache").keys() == names
    shards = str(tmp_path / "cache" / "shard-*.arrow")
    table = load_dataset("arrow", data_files=shards, split="train", cache_dir=tmp_path)
    assert sum(table["tokens"]) == manifest.data["tokens"]
    assert len(table) == manifest.data["examples"] == 40


LONG = {"shard_rows": 2, "batch_size": 2}


def _write_until_killed(events: int, folder: Path, kind: str) -> None:
    """Write a cache, and kill this process at the n-th file that is opened, synced or renamed in the folder."""
    left, fsync = [events], os.fsync

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        reads = event == "open" and arguments[1] in ("r", "rb")
        if event in ("open", "os.rename") and str(folder) in str(arguments[0]) and not reads:
            count()

    sys.addaudithook(audit)
    os.fsync = lambda descriptor: (count(), fsync(descriptor))
    torch.set_num_threads(1)
    write_test_cache(folder, kind, data=rows("llama", 120), **LONG)
    os._exit(0)


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_a_killed_write_is_resumed_to_the_same_bytes(tmp_path, kind):
    """The write is killed ten times: before and during the write of a file, before its rename, and before its entry."""
    moments, folder = random.Random(0), tmp_path / "k"
    write_test_cache(tmp_path / "straight", kind, data=rows("llama", 120), **LONG)
    for _ in range(10):
        events = moments.randrange(8, 40)
        child = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(events, folder, kind))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
        with pytest.raises(DistillError, match="unfinished cache"):
            open_cache(str(folder))
    count = len([*folder.glob("shard-*.arrow")])
    assert 0 < count < 60
    write_test_cache(folder, kind, data=rows("llama", 120), **LONG)
    assert content(folder) == content(tmp_path / "straight")


def test_a_complete_cache_is_not_written_again(tmp_path):
    write_test_cache(tmp_path / "cache")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir() if f.name != LOCK_FILE}
    write_test_cache(tmp_path / "cache")
    assert all(f.stat().st_mtime_ns == time for f, time in before.items())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "top_k"}, "kind is 'sampled' in the existing cache and 'top_k' in the new one"),
        ({"samples_per_token": 3}, "options is"),
        ({"temperature": 1.0}, "temperature is 2.0 in the existing cache and 1.0 in the new one"),
        ({"data": rows("llama", 39)}, "data is"),
    ],
)
def test_a_folder_of_another_cache_is_refused_and_not_changed(tmp_path, options, what):
    write_test_cache(tmp_path / "cache")
    before = content(tmp_path / "cache")
    with pytest.raises(DistillError, match=what):
        write_test_cache(tmp_path / "cache", **options)
    assert content(tmp_path / "cache") == before


def test_a_second_writer_of_a_folder_is_refused_without_harm_to_the_first(tmp_path):
    """A second write to the same folder during the first write raises a one-line error."""
    refused = []

    def second(progress):
        if not refused:
            with pytest.raises(
                DistillError, match=r"Another process writes to .*: hf-distill cache write, process \d+"
            ):
                write_test_cache(tmp_path / "cache")
            refused.append(progress)

    write_test_cache(tmp_path / "straight")
    write_test_cache(tmp_path / "cache", on_progress=second)
    assert refused
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def test_progress_is_reported_after_each_batch(tmp_path):
    reports = []
    manifest = write_test_cache(tmp_path / "cache", on_progress=reports.append)
    batches = sum(-(-entry["examples"] // manifest.data["batch_size"]) for entry in manifest.shards)
    assert len(reports) == batches > len(manifest.shards)
    tokens = [progress.tokens for progress in reports]
    assert tokens == sorted(set(tokens))
    assert tokens[-1] == reports[-1].total_tokens == manifest.data["tokens"]
    assert reports[0].bytes_per_token == 0 < reports[-1].bytes_per_token


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match=r"holds notes.txt and no cache"):
        write_test_cache(tmp_path)


def fill_disk_at(patch, name):
    """Let the disk be full when a file of this name is flushed."""
    flush = files.flush

    def full(path):
        if path.name.startswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(path)

    patch.setattr(files, "flush", full)


def test_a_write_is_resumed_after_a_full_disk(tmp_path, monkeypatch):
    write_test_cache(tmp_path / "straight")
    fill_disk_at(monkeypatch, "shard-00002.arrow")
    with pytest.raises(DistillError, match=r"shard-00002.arrow cannot be written .No space left on device.*resumes"):
        write_test_cache(tmp_path / "full")
    names = content(tmp_path / "full").keys()
    assert names == {"capture.json", *(f"shard-0000{i}.{kind}" for i in (0, 1) for kind in ("arrow", "json"))}
    monkeypatch.undo()
    write_test_cache(tmp_path / "full")
    assert content(tmp_path / "full") == content(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_every_flipped_bit_is_detected_and_the_file_named(tmp_path, kind):
    folder, flips = tmp_path / "cache", random.Random(1)
    manifest = write_test_cache(folder, kind)
    files = [folder / "manifest.json", *(folder / entry["file"] for entry in manifest.files)]
    sizes = [f.stat().st_size for f in files]
    for _ in range(50):
        (file,) = flips.choices(files, weights=sizes)
        intact = file.read_bytes()
        damaged = bytearray(intact)
        damaged[flips.randrange(len(intact))] ^= 1 << flips.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DistillError, match=file.name):
            verify_cache(folder)
        file.write_bytes(intact)
    assert verify_cache(folder) == manifest


def _partial(folder, kind):
    """Write a cache and fail after three of its five shards."""
    with pytest.MonkeyPatch.context() as patch:
        fill_disk_at(patch, "shard-00003.arrow")
        with pytest.raises(DistillError, match="cannot be written"):
            write_test_cache(folder, kind)


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_files_with_a_flipped_bit_are_written_again_when_a_write_is_resumed(tmp_path, kind):
    """A resumed write verifies the checksum of every file and writes damaged files again, with the same bytes."""
    flips = random.Random(2)
    write_test_cache(tmp_path / "straight", kind)
    _partial(tmp_path / "partial", kind)
    names = [*content(tmp_path / "partial")]
    assert len(names) == 7 + 2 * (kind == "hidden")
    for name in names:
        folder = tmp_path / f"flipped-{name}"
        shutil.copytree(tmp_path / "partial", folder)
        damaged = bytearray((folder / name).read_bytes())
        damaged[flips.randrange(len(damaged))] ^= 1 << flips.randrange(8)
        (folder / name).write_bytes(damaged)
        if name == "capture.json":
            with pytest.raises(DistillError, match=r"capture\.json is damaged"):
                write_test_cache(folder, kind)
        else:
            write_test_cache(folder, kind)
            assert content(folder) == content(tmp_path / "straight"), name


@pytest.mark.parametrize("damage", ["[]", "5", "", "{}", None])
def test_a_malformed_entry_or_manifest_raises_a_distill_error(tmp_path, damage):
    write_test_cache(tmp_path / "straight")
    _partial(tmp_path / "partial", "sampled")
    entry, manifest = tmp_path / "partial" / "shard-00001.json", tmp_path / "straight" / "manifest.json"
    before = content(tmp_path / "straight")
    for file in (entry, manifest):
        file.unlink()
        _ = file.mkdir() if damage is None else file.write_text(damage)
    with pytest.raises(DistillError, match=r"manifest\.json is damaged"):
        open_cache(str(tmp_path / "straight"))
    if damage is None:
        with pytest.raises(DistillError, match=r"shard-00001\.json: a folder has the name of a file of the cache"):
            write_test_cache(tmp_path / "partial")
        entry.rmdir()
    write_test_cache(tmp_path / "partial")
    assert content(tmp_path / "partial") == before


def test_a_damaged_complete_cache_is_refused(tmp_path):
    write_test_cache(tmp_path / "cache")
    file = tmp_path / "cache" / "shard-00002.arrow"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DistillError, match=r"complete cache, but .*shard-00002\.arrow is damaged"):
        write_test_cache(tmp_path / "cache")


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b + b"x", lambda b: b[:-20] + b"y" + b[-19:], None])
def test_a_damaged_shard_is_refused_when_it_is_read(tmp_path, damage):
    folder = tmp_path / "cache"
    write_test_cache(folder)
    file = folder / "shard-00001.arrow"
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    store = CacheReader(folder)
    batch = [collate(rows("llama", 40)[i : i + 8]) for i in (0, 8)]
    from hf_distill.cache import batch_examples
    from hf_distill.core.targets import Targets

    keys = [[e.key for e in batch_examples(b, Targets.from_batch(b, shift=True))] for b in batch]
    assert None not in store.get(keys[0])
    with pytest.raises(DistillError, match=r"shard-00001\.arrow is"):
        store.get(keys[1])


def test_a_path_without_a_cache_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r"is not a cache: it has no manifest\.json"):
        open_cache(str(tmp_path))
    with pytest.raises(DistillError, match="not the URI of a data set"):
        open_cache("hf://models/org/name")


def test_repeated_examples_are_stored_once(tmp_path):
    data = rows("llama", 12)
    once = write_test_cache(tmp_path / "once", data=data)
    twice = write_test_cache(tmp_path / "twice", data=[*data, *data[:7]])
    assert twice.data["examples"] == once.data["examples"] == 12


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "topk"}, "kind is 'topk'; it must be one of hidden, sampled, top_k"),
        ({"samples_per_token": 0}, "samples_per_token is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"kind": "hidden", "dtype": "int8"}, "dtype is 'int8'"),
        ({"kind": "top_k", "layers": [1]}, "remove layers"),
        ({"data": [{**r, "labels": r["labels"] * 0 - 100} for r in rows("llama", 4)]}, "nothing to write"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_written(tmp_path, options, what):
    with pytest.raises(DistillError, match=what):
        write_test_cache(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_kind_hidden_is_refused_without_a_plain_linear_head(tmp_path):
    with pytest.raises(DistillError, match="use --kind sampled or --kind top_k"):
        write_cache(tmp_path / "c", build("sequence", 1), rows("sequence", 8), collator=collate, kind="hidden")
    manifest = write_cache(
        tmp_path / "d", build("sequence", 1), rows("sequence", 8), collator=collate, kind="top_k", k=5
    )
    assert manifest.data["tokens"] == 8
