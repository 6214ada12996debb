"""Caches on two processes: what two write is what one writes, and two read as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import two_writers
from launching import both_of_two

from hf_distill.core.locks import lock_folder

SCRIPT = Path(two_writers.__file__)
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
DATA = ["data.task.path=texts.jsonl", "train.learning_rate=0.01"]


def run(folder: Path, ranks: int, *words: str) -> None:
    launch = [sys.executable, "-m", "hf_distill", *words]
    if ranks > 1:
        launch[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(launch, capture_output=True, text=True, env=ENVIRONMENT, timeout=600, cwd=folder)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def write(folder: Path, ranks: int, name: str, *more: str) -> dict[str, bytes]:
    options = ["--smoke", "-o", name, "--kind", "sampled", "--shard-rows", "6", "--batch-size", "2"]
    run(folder, ranks, "cache", "write", "cached", *DATA, *more, *options)
    return {
        f.name: f.read_bytes() for f in sorted((folder / name).iterdir()) if f.name not in ("manifest.json", ".lock")
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("caches")
    lines = [json.dumps({"text": f"The number {i} times {i} is {i * i}, and not {i * i + 1}. " * 3}) for i in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def one(place):
    return write(place, 1, "one")


def test_two_processes_write_what_one_writes(place, one):
    assert write(place, 2, "two") == one
    assert len(one) > 5


def test_a_teacher_that_is_sharded_by_zero3_writes_the_same(place, one):
    sharded = write(place, 2, "zero3", "teacher.source.deepspeed=zero3-teacher.json")
    assert sharded == one


def test_a_second_writer_is_refused_on_every_rank_and_a_dead_rank_leaves_a_capture_that_goes_on(tmp_path):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.md").write_text("mine")
    with lock_folder(tmp_path / "locked", "hf-distill cache write"):
        ended = both_of_two(SCRIPT, str(tmp_path))
    for _, message in ended:
        assert f"Another process writes to {tmp_path / 'locked'}" in message
        assert f"{tmp_path / 'foreign'} holds notes.md and no cache" in message
    assert ended[1][0] == 13
    assert ended[0][0] not in (0, -9)  # it ended by itself
    assert sorted(file.name for file in (tmp_path / "foreign").iterdir()) == [".lock", "notes.md"]
    assert not (tmp_path / "cut" / "manifest.json").exists()
    whole, cut = two_writers.write(tmp_path / "whole"), two_writers.write(tmp_path / "cut")
    assert cut.shards == whole.shards
    assert len(whole.shards) == 6


def test_two_processes_read_as_one(place, one):
    models = []
    for ranks, batch in ((1, 4), (2, 2)):
        options = ["--smoke", "teacher.path=one", f"train.output_dir=run{ranks}", "control=null"]
        run(place, ranks, "run", "cached", *DATA, *options, f"train.per_device_train_batch_size={batch}",
            "train.train_sampling_strategy=sequential")  # fmt: skip
        models.append(json.loads((place / f"run{ranks}" / "results.json").read_text())["models"]["student"])
    for name in ("perplexity", "soft_loss", "hard_loss"):
        assert models[0][name] == pytest.approx(models[1][name], rel=1e-5)
