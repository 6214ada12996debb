"""A sample of `make soak`: a run that is killed at any moment and resumed has the result of an undisturbed run."""

import json
import shutil
import sys
from importlib import import_module

import pytest
from crashing import (
    KILL_LOCATIONS,
    KINDS,
    NUM_RANKS,
    KillPoint,
    draw_kill_points,
    folders_without_complete_checkpoint,
    kill_and_resume,
    make_workload,
    run_in_process,
    run_outputs,
)

from hf_distill.trainer.checkpoints import checkpoints_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX")


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory):
    """A folder with the cache that all trials use."""
    folder = tmp_path_factory.mktemp("crashes")
    assert run_in_process(make_workload("capture", folder), folder / "cache") == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_result(shared_folder, kind):
    workload = make_workload(kind, shared_folder)
    file = shared_folder / f"{kind}.json"
    assert run_in_process(workload, shared_folder / kind, counts=file, num_ranks=NUM_RANKS[kind]) == 0, (
        shared_folder / kind / "log"
    ).read_text()[-3000:]
    counts, expected = json.loads(file.read_text()), run_outputs(shared_folder / kind, kind)
    assert len(expected) > 3
    drawn = draw_kill_points(counts, 3, seed=sum(kind.encode()))[: 1 if kind == "chain" else 2]  # a time and a location
    assert not [
        lost
        for i, kill_point in enumerate(drawn)
        if (lost := kill_and_resume(workload, shared_folder / f"{kind}-{i}", kill_point, expected, kind))
    ]


def test_a_kill_during_rotation_keeps_two_checkpoints(shared_folder):
    """The other tests keep one checkpoint."""
    workload = make_workload("ema", shared_folder, "train.save_total_limit=2")
    assert run_in_process(workload, shared_folder / "two", counts=shared_folder / "two.json") == 0
    assert len(checkpoints_of(shared_folder / "two" / "run")) == 2
    expected = run_outputs(shared_folder / "two", "ema")
    for when in ("before", "after"):
        assert (
            kill_and_resume(
                workload,
                shared_folder / f"two-{when}",
                KillPoint(location="old checkpoint", call=1, when=when),
                expected,
                "ema",
            )
            is None
        )


def test_a_trial_detects_the_loss_of_the_only_checkpoint(shared_folder):
    workload = make_workload("ema", shared_folder)
    lost = kill_and_resume(workload, shared_folder / "none", KillPoint(location="step", call=5), {}, "ema")
    assert lost
    assert "not the same" in lost  # one is complete
    shutil.rmtree(shared_folder / "none" / "run")
    (shared_folder / "none" / "run").mkdir()
    assert folders_without_complete_checkpoint(shared_folder / "none") == ["run"]


def test_a_trial_detects_different_results(shared_folder):
    """A run with another seed has another result, so the comparison can fail."""
    workload = make_workload("ema", shared_folder)
    assert run_in_process(workload, shared_folder / "one") == 0
    assert run_in_process(make_workload("ema", shared_folder, "train.seed=1"), shared_folder / "other") == 0
    one, other = run_outputs(shared_folder / "one", "ema"), run_outputs(shared_folder / "other", "ema")
    assert {"student/model.safetensors", "models", "logs"} <= {name for name in one if one[name] != other.get(name)}


def test_every_location_of_a_kill_exists():
    """A renamed location fails here, with its name, and not in every trial."""
    for where, _ in KILL_LOCATIONS.values():
        module, _, path = where.partition(":")
        owner = import_module(module)
        for name in path.split("."):
            owner = getattr(owner, name)
        assert callable(owner), where
