"""A sample of `make soak`: a run that is killed at any moment and resumed ends as if nothing had been."""

import json
import sys

import pytest
from crashing import KINDS, content, fates, job_of, started, trial

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 is of POSIX")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What trials share: a cache."""
    folder = tmp_path_factory.mktemp("crashes")
    assert started(job_of("capture", folder), folder / "cache") == 0
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_by_a_kill(place, kind):
    job = job_of(kind, place)
    assert started(job, place / kind, counts=place / f"{kind}.json") == 0, (place / kind / "log").read_text()[-3000:]
    counts, expected = json.loads((place / f"{kind}.json").read_text()), content(place / kind, kind)
    assert len(expected) > 3
    drawn = fates(counts, 3, seed=sum(kind.encode()))[: 1 if kind == "chain" else None]
    assert not [
        lost for i, fate in enumerate(drawn) if (lost := trial(job, place / f"{kind}-{i}", fate, expected, kind))
    ]


def test_a_difference_would_be_seen(place):
    """Another seed ends elsewhere: the comparison can fail."""
    job = job_of("ema", place)
    assert started(job, place / "one") == 0
    assert started(job_of("ema", place, "train.seed=1"), place / "other") == 0
    one, other = content(place / "one", "ema"), content(place / "other", "ema")
    assert {"student/model.safetensors", "models", "logs"} <= {n for n in one if one[n] != other.get(n)}
