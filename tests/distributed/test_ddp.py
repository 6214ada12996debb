import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("ddp_run.py")


def seen(folder: Path, ranks: int) -> dict:
    """Run the script on some ranks and read what rank 0 saw."""
    folder.mkdir()
    launch = [sys.executable, str(SCRIPT), str(folder)]
    if ranks > 1:
        launch[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[:6000]
    return json.loads((folder / "seen.json").read_text())


def test_two_ranks_train_and_evaluate_as_one(tmp_path):
    """7 evaluation rows on 2 ranks: rows repeated to fill the last batch must not count twice."""
    one, two = seen(tmp_path / "one", 1), seen(tmp_path / "two", 2)
    assert (one["world"], two["world"]) == (1, 2)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b == pytest.approx(a, rel=1e-5)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)
    assert two["weights"] == pytest.approx(one["weights"], rel=1e-4, abs=1e-4)
