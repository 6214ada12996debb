"""A sample of `make soak`: a run that is killed at any moment and resumed ends as if nothing had been."""

import json
import shutil
import sys
from importlib import import_module

import pytest
from crashing import KINDS, PLACES, Fate, _without_complete, content, fates, make_workload, started, trial

from hf_distill.trainer.checkpoints import checkpoints_of

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What trials share: a cache."""
    folder = tmp_path_factory.mktemp("crashes")
    assert started(make_workload("capture", folder), folder / "cache") == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_by_a_kill(place, kind):
    job = make_workload(kind, place)
    assert started(job, place / kind, counts=place / f"{kind}.json") == 0, (place / kind / "log").read_text()[-3000:]
    counts, expected = json.loads((place / f"{kind}.json").read_text()), content(place / kind, kind)
    assert len(expected) > 3
    drawn = fates(counts, 3, seed=sum(kind.encode()))[: 1 if kind == "chain" else None]
    assert not [
        lost for i, fate in enumerate(drawn) if (lost := trial(job, place / f"{kind}-{i}", fate, expected, kind))
    ]


def test_two_checkpoints_are_kept_through_a_kill(place):
    """The other tests keep one."""
    job = make_workload("ema", place, "train.save_total_limit=2")
    assert started(job, place / "two", counts=place / "two.json") == 0
    assert len(checkpoints_of(place / "two" / "run")) == 2
    expected = content(place / "two", "ema")
    for when in ("before", "after"):
        assert (
            trial(job, place / f"two-{when}", Fate(place="old checkpoint", call=1, when=when), expected, "ema") is None
        )


def test_the_loss_of_the_only_checkpoint_would_be_seen(place):
    job = make_workload("ema", place)
    lost = trial(job, place / "none", Fate(place="step", call=5), {}, "ema")
    assert lost
    assert "not the same" in lost  # one is complete
    shutil.rmtree(place / "none" / "run")
    (place / "none" / "run").mkdir()
    assert _without_complete(place / "none") == ["run"]


def test_a_difference_would_be_seen(place):
    """Another seed ends elsewhere: the comparison can fail."""
    job = make_workload("ema", place)
    assert started(job, place / "one") == 0
    assert started(make_workload("ema", place, "train.seed=1"), place / "other") == 0
    one, other = content(place / "one", "ema"), content(place / "other", "ema")
    assert {"student/model.safetensors", "models", "logs"} <= {n for n in one if one[n] != other.get(n)}


def test_every_place_of_a_kill_is_there():
    """A place that was renamed fails here, by its name, and not in every trial."""
    for where, _ in PLACES.values():
        module, _, path = where.partition(":")
        owner = import_module(module)
        for name in path.split("."):
            owner = getattr(owner, name)
        assert callable(owner), where
