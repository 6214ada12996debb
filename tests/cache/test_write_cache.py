"""A capture that is cut off goes on; what is damaged is named."""

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
from hf_distill.cache import reader as store_module
from hf_distill.core.locks import LOCK_FILE


def teacher():
    return build("llama", 1, layers=3, width=48)


def written(folder, kind="sampled", data=None, **options):
    data = rows("llama", 40) if data is None else data
    given = {"collator": collate, "batch_size": 4, "shard_rows": 8} | options
    return write_cache(folder, teacher(), data, kind=kind, **given)


def content(folder: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir()) if f.name != LOCK_FILE}


@pytest.mark.parametrize("kind", ["hidden", "sampled", "top_k"])
def test_a_cache_is_whole_small_and_readable_by_datasets(tmp_path, kind):
    from datasets import load_dataset

    manifest = written(tmp_path / "cache", kind)
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


def _dies_after(events: int, folder: Path, kind: str) -> None:
    """Write a cache, and be killed by SIGKILL at the n-th file that is opened, synced or renamed in its folder."""
    left, fsync = [events], os.fsync

    def count() -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, given: tuple) -> None:
        reads = event == "open" and given[1] in ("r", "rb")
        if event in ("open", "os.rename") and str(folder) in str(given[0]) and not reads:
            count()

    sys.addaudithook(audit)
    store_module.os.fsync = lambda descriptor: (count(), fsync(descriptor))
    torch.set_num_threads(1)
    written(folder, kind, data=rows("llama", 120), **LONG)
    os._exit(0)


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(tmp_path, kind):
    """Ten times killed: before a file, with half of it written, before its new name, between a shard and its entry."""
    moments, folder = random.Random(0), tmp_path / "k"
    written(tmp_path / "straight", kind, data=rows("llama", 120), **LONG)
    for _ in range(10):
        events = moments.randrange(8, 40)
        child = multiprocessing.get_context("fork").Process(target=_dies_after, args=(events, folder, kind))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert not (folder / "manifest.json").exists()
        with pytest.raises(DistillError, match="unfinished cache"):
            open_cache(str(folder))
    count = len([*folder.glob("shard-*.arrow")])
    assert 0 < count < 60
    written(folder, kind, data=rows("llama", 120), **LONG)
    assert content(folder) == content(tmp_path / "straight")


def test_what_is_whole_is_not_written_again(tmp_path):
    written(tmp_path / "cache")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "cache").iterdir() if f.name != LOCK_FILE}
    written(tmp_path / "cache")
    assert all(f.stat().st_mtime_ns == time for f, time in before.items())


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "top_k"}, "kind is 'sampled' there and 'top_k' here"),
        ({"samples_per_token": 3}, "options is"),
        ({"temperature": 1.0}, "temperature is 2.0 there and 1.0 here"),
        ({"data": rows("llama", 39)}, "data is"),
    ],
)
def test_a_folder_of_another_capture_is_refused_and_left(tmp_path, options, what):
    written(tmp_path / "cache")
    before = content(tmp_path / "cache")
    with pytest.raises(DistillError, match=what):
        written(tmp_path / "cache", **options)
    assert content(tmp_path / "cache") == before


def test_a_second_writer_of_a_folder_is_refused_and_the_first_one_ends_well(tmp_path):
    """Two captures of one folder at once: the second one, started in the middle of the first, gets one line."""
    refused = []

    def second(progress):
        if not refused:
            with pytest.raises(
                DistillError, match=r"Another process writes to .*: hf-distill cache write, process \d+"
            ):
                written(tmp_path / "cache")
            refused.append(progress)

    written(tmp_path / "straight")
    written(tmp_path / "cache", on_progress=second)
    assert refused
    assert content(tmp_path / "cache") == content(tmp_path / "straight")


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DistillError, match=r"holds notes.txt and no cache"):
        written(tmp_path)


def test_a_full_disk_leaves_whole_shards_alone_and_the_next_try_goes_on(tmp_path, monkeypatch):
    written(tmp_path / "straight")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(store_module.os, "fsync", full)
    with pytest.raises(DistillError, match=r"shard-00002.arrow cannot be written .No space left on device.*goes on"):
        written(tmp_path / "full")
    names = content(tmp_path / "full").keys()
    assert names == {"capture.json", *(f"shard-0000{i}.{kind}" for i in (0, 1) for kind in ("arrow", "json"))}
    monkeypatch.undo()
    written(tmp_path / "full")
    assert content(tmp_path / "full") == content(tmp_path / "straight")


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_a_hundred_of_a_hundred_flipped_bits_are_found_and_their_file_named(tmp_path, kind):
    folder, flips = tmp_path / "cache", random.Random(1)
    manifest = written(folder, kind)
    files = [folder / "manifest.json", *(folder / entry["file"] for entry in manifest.files)]
    sizes = [f.stat().st_size for f in files]
    for _ in range(50):
        (file,) = flips.choices(files, weights=sizes)
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[flips.randrange(len(whole))] ^= 1 << flips.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(DistillError, match=file.name):
            verify_cache(folder)
        file.write_bytes(whole)
    assert verify_cache(folder) == manifest


def _partial(folder, kind):
    """A capture that was cut off after three of its five shards."""
    real, calls = store_module.os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module.os, "fsync", full)
        with pytest.raises(DistillError, match="cannot be written"):
            written(folder, kind)


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_a_bit_flipped_in_an_unfinished_capture_is_never_sealed_as_valid(tmp_path, kind):
    """Resuming verifies every file against its digest: the damaged ones are written again, to the same bytes."""
    flips = random.Random(2)
    written(tmp_path / "straight", kind)
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
                written(folder, kind)
        else:
            written(folder, kind)
            assert content(folder) == content(tmp_path / "straight"), name


@pytest.mark.parametrize("damage", ["[]", "5", "", "{}", None])
def test_an_entry_or_manifest_that_is_something_else_is_not_a_traceback(tmp_path, damage):
    written(tmp_path / "straight")
    _partial(tmp_path / "partial", "sampled")
    entry, manifest = tmp_path / "partial" / "shard-00001.json", tmp_path / "straight" / "manifest.json"
    before = content(tmp_path / "straight")
    for file in (entry, manifest):
        file.unlink()
        _ = file.mkdir() if damage is None else file.write_text(damage)
    with pytest.raises(DistillError, match=r"manifest\.json is damaged"):
        open_cache(str(tmp_path / "straight"))
    if damage is None:
        with pytest.raises(DistillError, match=r"shard-00001\.json: a folder stands where a file belongs"):
            written(tmp_path / "partial")
        entry.rmdir()
    written(tmp_path / "partial")
    assert content(tmp_path / "partial") == before


def test_a_complete_cache_that_is_damaged_is_not_reported_as_written(tmp_path):
    written(tmp_path / "cache")
    file = tmp_path / "cache" / "shard-00002.arrow"
    damaged = bytearray(file.read_bytes())
    damaged[100] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(DistillError, match=r"complete cache, and .*shard-00002\.arrow is damaged"):
        written(tmp_path / "cache")


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b + b"x", lambda b: b[:-20] + b"y" + b[-19:], None])
def test_a_damaged_shard_is_refused_when_it_is_read(tmp_path, damage):
    folder = tmp_path / "cache"
    written(folder)
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


def test_what_is_no_cache_is_refused(tmp_path):
    with pytest.raises(DistillError, match=r"is not a cache: it has no manifest\.json"):
        open_cache(str(tmp_path))
    with pytest.raises(DistillError, match="no address of a data set"):
        open_cache("hf://models/org/name")


def test_examples_that_come_twice_are_stored_once(tmp_path):
    data = rows("llama", 12)
    once = written(tmp_path / "once", data=data)
    twice = written(tmp_path / "twice", data=[*data, *data[:7]])
    assert twice.data["examples"] == once.data["examples"] == 12


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"kind": "topk"}, "kind is 'topk'; known: hidden, sampled, top_k"),
        ({"samples_per_token": 0}, "draws is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"kind": "hidden", "dtype": "int8"}, "dtype is 'int8'"),
        ({"kind": "top_k", "layers": [1]}, "leave layers out"),
        ({"data": [{**r, "labels": r["labels"] * 0 - 100} for r in rows("llama", 4)]}, "nothing to write"),
    ],
)
def test_bad_options_are_told_before_anything_is_written(tmp_path, options, what):
    with pytest.raises(DistillError, match=what):
        written(tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_hidden_states_of_a_model_whose_head_is_no_plain_layer_are_refused(tmp_path):
    with pytest.raises(DistillError, match="write --kind sampled or --kind top_k"):
        write_cache(tmp_path / "c", build("sequence", 1), rows("sequence", 8), collator=collate, kind="hidden")
    manifest = write_cache(
        tmp_path / "d", build("sequence", 1), rows("sequence", 8), collator=collate, kind="top_k", k=5
    )
    assert manifest.data["tokens"] == 8
