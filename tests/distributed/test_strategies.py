"""Two processes against one, for real: DDP, DeepSpeed's ZeRO and FSDP2 over gloo, for students and for teachers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import ENVIRONMENT, one_of_two
from safetensors.torch import load_file
from tiny import build
from transformers import AutoModelForCausalLM

from hf_distill.models.sidecar import FILE

SCRIPT = Path(__file__).with_name("two_ranks.py")


def seen(folder: Path, ranks: int, *variants: str) -> dict:
    """Run the script on some ranks and read what rank 0 saw."""
    folder.mkdir(exist_ok=True)
    launch = [sys.executable, str(SCRIPT), str(folder), *variants]
    if ranks > 1:
        launch[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(launch, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads((folder / ("resumed.json" if "resume" in variants else "straight.json")).read_text())


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a tiny student and a teacher whose vocabulary is padded, in `models`."""
    folder = tmp_path_factory.mktemp("strategies")
    build("llama", 0).save_pretrained(folder / "models" / "student")
    build("llama", 1, layers=3, width=48, vocab=101).save_pretrained(folder / "models" / "teacher")
    return folder


@pytest.fixture(scope="module")
def alone(place) -> Callable[..., dict]:
    """`alone("features")`: what one process sees, in `one` and `one-features`; each run once."""
    known: dict[tuple, dict] = {}

    def run(*variants: str) -> dict:
        if variants not in known:
            known[variants] = seen(place / "-".join(["one", *variants]), 1, *variants)
        return known[variants]

    return run


def assert_equal(two: dict, one: dict, rel: float = 1e-5) -> None:
    assert (one["world"], two["world"], len(two["log"])) == (1, 2, 10)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b == pytest.approx(a, rel=rel)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=rel)


def assert_same_plain_folder(two: Path, one: Path) -> None:
    """Saved weights of both runs, as `from_pretrained` loads them."""
    loaded, weights = AutoModelForCausalLM.from_pretrained(two, output_loading_info=True)
    assert not any(weights.values())
    reference = AutoModelForCausalLM.from_pretrained(one).state_dict()
    for name, value in loaded.state_dict().items():
        assert (value - reference[name]).abs().max() < 1e-4, name


def test_two_ranks_train_and_evaluate_as_one(place, alone):
    """7 evaluation rows on 2 ranks: rows repeated to fill the last batch must not count twice."""
    two = seen(place / "ddp", 2)
    assert_equal(two, alone())
    assert two["teacher_held"] == 1.0
    assert_same_plain_folder(place / "ddp" / "straight-saved", place / "one" / "straight-saved")


@pytest.mark.parametrize("strategy", [(), ("zero3",)], ids=["ddp", "zero3"])
def test_features_on_two_ranks_are_those_on_one_and_resume_as_if_nothing_had_been(place, alone, strategy):
    """Under ZeRO-3 the script loads the teacher while the student's config is alive, so it comes sharded."""
    folder = place / "-".join(["features", *strategy])
    one, two = alone("features"), seen(folder, 2, "features", *strategy)
    assert {"hidden_mse_loss", "attention_kl_loss", "grad_norm"} <= one["log"][0].keys()
    assert_equal(two, one)
    assert two["teacher_held"] <= (0.55 if strategy else 1.0)
    saved = [load_file(at / "straight" / "checkpoint-10" / FILE) for at in (place / "one-features", folder)]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        assert (saved[1][name] - value).abs().max() < 1e-5
    assert not any("sidecar" in n for n in load_file(folder / "straight-saved" / "model.safetensors"))
    resumed = seen(folder, 2, "features", *strategy, "resume")
    assert resumed["metrics"] == two["metrics"]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_average_of_a_sharded_student_is_that_of_a_whole_one(place, alone, strategy):
    """Each rank averages its share; a resumed run goes on as if nothing had been."""
    folder, variants = place / f"ema-{strategy}", [] if strategy == "ddp" else [strategy]
    one, two = alone("ema"), seen(folder, 2, "ema", *variants)
    assert one["log"][-1]["teacher_weight_drift"] > 0.01
    assert one["metrics"]["eval_kl"] > 1e-4
    assert_equal(two, one, rel=1e-3)
    if strategy == "zero3":
        resumed = seen(folder, 2, "ema", *variants, "resume")
        assert resumed["metrics"] == two["metrics"]


@pytest.mark.parametrize(
    ("kind", "strategy"),
    [
        ("mutual", "ddp"),
        ("mutual", "zero2"),
        ("mutual", "zero3"),
        ("frozen", "ddp"),
        ("multi_view", "ddp"),
        ("multi_view", "zero3"),
        ("mtp", "ddp"),
        ("mtp", "zero2"),
    ],
)
def test_a_teacher_that_moves_does_so_on_two_ranks_as_on_one(place, alone, kind, strategy):
    folder, variants = place / f"{kind}-{strategy}", [] if strategy == "ddp" else [strategy]
    one, two = alone(kind), seen(folder, 2, kind, *variants)
    assert_equal(two, one, rel=1e-3)
    if (kind, strategy) in (("mutual", "zero3"), ("mtp", "ddp")):
        resumed = seen(folder, 2, kind, *variants, "resume")
        assert resumed["metrics"] == two["metrics"]


@pytest.mark.parametrize(
    "strategy",
    [
        ("features", "teacher=zero3"),
        ("zero1", "teacher=zero3"),
        ("zero2", "teacher=zero3"),
        ("features", "zero3", "teacher=zero3"),
        ("features", "teacher=fsdp2"),
        ("features", "fsdp2", "teacher=fsdp2"),
    ],
    ids="-".join,
)
def test_a_sharded_teacher_teaches_a_student_of_any_strategy_as_a_whole_one(place, alone, strategy):
    folder = place / "-".join(strategy)
    one, two = alone(*(["features"] if "features" in strategy else [])), seen(folder, 2, *strategy)
    assert_equal(two, one)
    assert two["teacher_held"] <= 0.55
    reference = place / ("one-features" if "features" in strategy else "one")
    assert_same_plain_folder(folder / "straight-saved", reference / "straight-saved")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(place, strategy):
    found = seen(place / f"sick-{strategy}", 2, strategy, "sick")
    assert found["skipped"] == [2]


def test_deepspeed_has_moved_by_then_so_training_stops(place):
    folder = place / "sick-zero2"
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run([*launch, str(folder), "zero2", "sick"], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode != 0
    assert "Training stops at step 2: 1 in a row" in done.stderr
    assert "could not be skipped" in done.stderr


@pytest.mark.parametrize("fate", ["die", "hang"])
def test_a_rank_that_dies_or_hangs_ends_the_others_with_a_message(place, fate):
    """No launcher that would kill the other: it has to notice by itself."""
    (place / fate).mkdir()
    code, message = one_of_two(0, SCRIPT, str(place / fate), "teacher=zero3", fate)
    assert code not in (0, -9)
    expected = "Timed out" if fate == "hang" else "by peer"
    assert expected in message, message[-3000:]
