"""Two processes against one, for real: DDP and DeepSpeed's ZeRO-3 over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from hf_distill.sidecar import FILE

SCRIPT = Path(__file__).with_name("ddp_run.py")


def seen(folder: Path, ranks: int, *variants: str) -> dict:
    """Run the script on some ranks and read what rank 0 saw."""
    folder.mkdir(exist_ok=True)
    launch = [sys.executable, str(SCRIPT), str(folder), *variants]
    if ranks > 1:
        launch[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[:6000]
    return json.loads((folder / ("resumed.json" if "resume" in variants else "straight.json")).read_text())


def assert_equal(two: dict, one: dict, rel: float = 1e-5) -> None:
    assert (one["world"], two["world"]) == (1, 2)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b == pytest.approx(a, rel=rel)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=rel)


def test_two_ranks_train_and_evaluate_as_one(tmp_path):
    """7 evaluation rows on 2 ranks: rows repeated to fill the last batch must not count twice."""
    one, two = seen(tmp_path / "one", 1), seen(tmp_path / "two", 2)
    assert_equal(two, one)
    one, two = (load_file(tmp_path / name / "straight-saved" / "model.safetensors") for name in ("one", "two"))
    assert {n: w.sum().item() for n, w in two.items()} == pytest.approx(
        {n: w.sum().item() for n, w in one.items()}, rel=1e-4, abs=1e-4
    )


@pytest.mark.parametrize("strategy", [(), ("zero3",)], ids=["ddp", "zero3"])
def test_features_on_two_ranks_are_those_on_one_and_resume_as_if_nothing_had_been(tmp_path, strategy):
    one = seen(tmp_path / "one", 1, "features")
    two = seen(tmp_path / "two", 2, "features", *strategy)
    assert {"hidden_mse_loss", "attention_kl_loss", "grad_norm"} <= one["log"][0].keys()
    assert_equal(two, one)
    saved = [load_file(tmp_path / name / "straight" / "checkpoint-4" / FILE) for name in ("one", "two")]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        assert (saved[1][name] - value).abs().max() < 1e-5
    assert not any("sidecar" in n for n in load_file(tmp_path / "two" / "straight-saved" / "model.safetensors"))
    resumed = seen(tmp_path / "two", 2, "features", *strategy, "resume")
    assert resumed["metrics"] == two["metrics"]
