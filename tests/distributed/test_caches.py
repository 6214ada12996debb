"""Teacher caches on two processes equal those on one, in writing and in training."""

import json
from pathlib import Path

import pytest
import two_writers
from launching import run_both_ranks, run_on_ranks

from hf_distill.core.locks import lock_folder

DATA = ["data.task.path=texts.jsonl", "train.learning_rate=0.01"]


def run(folder: Path, ranks: int, *arguments: str) -> None:
    ended = run_on_ranks(ranks, "-m", "hf_distill", *arguments, folder=folder)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


def write(folder: Path, ranks: int, name: str, *more: str) -> dict[str, bytes]:
    options = ["--smoke", "-o", name, "--kind", "sampled", "--shard-rows", "6", "--batch-size", "2"]
    run(folder, ranks, "cache", "write", "cached", *DATA, *more, *options)
    return {
        f.name: f.read_bytes() for f in sorted((folder / name).iterdir()) if f.name not in ("manifest.json", ".lock")
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    lines = [json.dumps({"text": f"The number {i} times {i} is {i * i}, and not {i * i + 1}. " * 3}) for i in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def one(folder):
    return write(folder, 1, "one")


def test_two_processes_write_the_cache_that_one_writes(folder, one):
    assert write(folder, 2, "two") == one
    assert len(one) > 5


def test_a_zero3_teacher_writes_the_cache_of_an_unsharded_one(folder, one):
    sharded = write(folder, 2, "zero3", "teacher.source.deepspeed=zero3-teacher.json")
    assert sharded == one
    manifests = [json.loads((folder / name / "manifest.json").read_text()) for name in ("zero3", "one")]
    assert manifests[0]["teacher"]["weights"] == manifests[1]["teacher"]["weights"]


def test_a_second_writer_raises_an_error_on_every_rank_and_a_dead_rank_leaves_a_resumable_cache(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.md").write_text("mine")
    with lock_folder(tmp_path / "locked", "hf-distill cache write"):
        ended = run_both_ranks(two_writers.__file__, str(tmp_path))
    for _, message in ended:
        assert f"Another process writes to {tmp_path / 'locked'}" in message
        assert f"{tmp_path / 'foreign'} holds notes.md and no cache" in message
    assert ended[1][0] == 13
    assert ended[0][0] not in (0, -9)  # no signal ended it
    assert sorted(file.name for file in (tmp_path / "foreign").iterdir()) == [".lock", "notes.md"]
    assert not (tmp_path / "cut" / "manifest.json").exists()
    uninterrupted, cut = two_writers.write(tmp_path / "whole"), two_writers.write(tmp_path / "cut")
    assert cut.shards == uninterrupted.shards
    assert len(uninterrupted.shards) == 6


def test_two_processes_train_from_a_cache_as_one_does(folder, one):
    models = []
    for ranks, batch in ((1, 4), (2, 2)):
        options = ["--smoke", "teacher.path=one", f"train.output_dir=run{ranks}", "control=null"]
        run(folder, ranks, "run", "cached", *DATA, *options, f"train.per_device_train_batch_size={batch}",
            "train.train_sampling_strategy=sequential")  # fmt: skip
        models.append(json.loads((folder / f"run{ranks}" / "results.json").read_text())["models"]["student"])
    for name in ("perplexity", "soft_loss", "hard_loss"):
        assert models[0][name] == pytest.approx(models[1][name], rel=1e-5)
