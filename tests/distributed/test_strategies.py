"""Two processes train as one does: DDP, DeepSpeed ZeRO and FSDP2 over gloo, for students and teachers."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from launching import run_on_ranks, run_one_rank
from safetensors.torch import load_file
from tiny import build
from trained_tokenizers import trained
from transformers import AutoModelForCausalLM

from hf_distill.models.sidecar import FILE

SCRIPT = str(Path(__file__).with_name("two_ranks.py"))


def run_script(folder: Path, ranks: int, *variants: str) -> dict:
    """Run the script on some ranks, and return the results of rank 0."""
    folder.mkdir(exist_ok=True)
    ended = run_on_ranks(ranks, SCRIPT, str(folder), *variants)
    assert ended.returncode == 0, ended.stderr[-6000:]
    return json.loads((folder / ("resumed.json" if "resume" in variants else "straight.json")).read_text())


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a tiny student and a teacher whose vocabulary is padded, in `models`."""
    folder = tmp_path_factory.mktemp("strategies")
    build("llama", 0).save_pretrained(folder / "models" / "student")
    build("llama", 1, layers=3, width=48, vocab=101).save_pretrained(folder / "models" / "teacher")
    for seed, (name, kind) in enumerate((("student", "groups"), ("teacher", "digits"))):
        tokenizer, path = trained(kind), folder / "models" / f"{name}-{kind}"
        build("llama", seed, vocab=len(tokenizer)).save_pretrained(path)
        tokenizer.save_pretrained(path)
    return folder


@pytest.fixture(scope="module")
def results_of_one_rank(root) -> Callable[..., dict]:
    """Return the results of one process for some variants, in folders such as `one-features`; each runs once."""
    cached_results: dict[tuple, dict] = {}

    def run(*variants: str) -> dict:
        if variants not in cached_results:
            cached_results[variants] = run_script(root / "-".join(["one", *variants]), 1, *variants)
        return cached_results[variants]

    return run


def assert_equal(two: dict, one: dict, rel: float = 1e-5) -> None:
    assert (one["world"], two["world"], len(two["log"])) == (1, 2, 10)
    for a, b in zip(one["log"], two["log"], strict=True):
        assert b == pytest.approx(a, rel=rel)
    assert two["metrics"] == pytest.approx(one["metrics"], rel=rel)


def assert_same_plain_folder(two: Path, one: Path) -> None:
    """Compare the saved weights of both runs, as `from_pretrained` loads them."""
    loaded, weights = AutoModelForCausalLM.from_pretrained(two, output_loading_info=True)
    assert not any(weights.values())
    reference = AutoModelForCausalLM.from_pretrained(one).state_dict()
    for name, value in loaded.state_dict().items():
        assert (value - reference[name]).abs().max() < 1e-4, name


def test_two_ranks_train_and_evaluate_as_one_does(root, results_of_one_rank):
    """With 7 evaluation rows on 2 ranks, the row that is repeated to fill the last batch must not count twice."""
    two = run_script(root / "ddp", 2)
    assert_equal(two, results_of_one_rank())
    assert two["teacher_share"] == 1.0
    assert_same_plain_folder(root / "ddp" / "straight-saved", root / "one" / "straight-saved")


def test_weights_and_losses_by_author_on_two_ranks_equal_those_on_one(root, results_of_one_rank):
    one, two = results_of_one_rank("row_values"), run_script(root / "row_values", 2, "row_values")
    assert {"soft_loss_origin_teacher", "hard_loss_origin_data"} <= one["log"][0].keys()
    assert one["log"][0]["loss"] != results_of_one_rank()["log"][0]["loss"]
    assert_equal(two, one)


@pytest.mark.parametrize("strategy", [(), ("zero2",)], ids=["ddp", "zero2"])
def test_a_quantized_student_on_two_ranks_equals_that_on_one(root, results_of_one_rank, strategy):
    """Loss and gradient of the first step are equal. The largest weight of each group is halfway between two integers,
    so that in later steps differences of rounding in float32 move it by a whole integer.
    """
    one = results_of_one_rank("quantized")
    two = run_script(root / "-".join(["quantized", *strategy]), 2, "quantized", *strategy)
    assert one["log"][0]["loss"] != results_of_one_rank()["log"][0]["loss"]
    assert two["log"][0] == pytest.approx(one["log"][0], rel=1e-5)
    assert (one["world"], two["world"], len(two["log"])) == (1, 2, 10)
    assert [log["loss"] for log in two["log"]] == pytest.approx([log["loss"] for log in one["log"]], rel=2e-2)


@pytest.mark.parametrize("strategy", [(), ("zero3",)], ids=["ddp", "zero3"])
def test_feature_losses_on_two_ranks_equal_those_on_one_and_resume_exactly(root, results_of_one_rank, strategy):
    """Under ZeRO-3 the teacher is sharded too, because the student's config is active when it is loaded."""
    folder = root / "-".join(["features", *strategy])
    one, two = results_of_one_rank("features"), run_script(folder, 2, "features", *strategy)
    assert {"hidden_mse_loss", "attention_kl_loss", "grad_norm"} <= one["log"][0].keys()
    assert_equal(two, one)
    assert two["teacher_share"] <= (0.55 if strategy else 1.0)
    saved = [load_file(at / "straight" / "checkpoint-10" / FILE) for at in (root / "one-features", folder)]
    assert saved[0].keys() == saved[1].keys()
    for name, value in saved[0].items():
        assert (saved[1][name] - value).abs().max() < 1e-5
    assert not any("sidecar" in n for n in load_file(folder / "straight-saved" / "model.safetensors"))
    resumed = run_script(folder, 2, "features", *strategy, "resume")
    assert resumed["metrics"] == two["metrics"]


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "fsdp2"])
def test_the_ema_of_a_sharded_student_equals_that_of_an_unsharded_one(root, results_of_one_rank, strategy):
    """Each rank averages its shard, and a resumed run gives the same results."""
    folder, variants = root / f"ema-{strategy}", [] if strategy == "ddp" else [strategy]
    one, two = results_of_one_rank("ema"), run_script(folder, 2, "ema", *variants)
    assert one["log"][-1]["teacher_weight_drift"] > 0.01
    assert one["metrics"]["eval_kl"] > 1e-4
    assert_equal(two, one, rel=1e-3)
    if strategy == "zero3":
        resumed = run_script(folder, 2, "ema", *variants, "resume")
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
def test_non_frozen_teachers_train_on_two_ranks_as_on_one(root, results_of_one_rank, kind, strategy):
    folder, variants = root / f"{kind}-{strategy}", [] if strategy == "ddp" else [strategy]
    one, two = results_of_one_rank(kind), run_script(folder, 2, kind, *variants)
    assert_equal(two, one, rel=1e-3)
    if (kind, strategy) in (("mutual", "zero3"), ("mtp", "ddp")):
        resumed = run_script(folder, 2, kind, *variants, "resume")
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
def test_a_sharded_teacher_trains_any_student_as_an_unsharded_one_does(root, results_of_one_rank, strategy):
    folder = root / "-".join(strategy)
    one, two = results_of_one_rank(*(["features"] if "features" in strategy else [])), run_script(folder, 2, *strategy)
    assert_equal(two, one)
    assert two["teacher_share"] <= 0.55
    reference = root / ("one-features" if "features" in strategy else "one")
    assert_same_plain_folder(folder / "straight-saved", reference / "straight-saved")


@pytest.mark.parametrize(
    "strategy", [(), ("zero3", "teacher=zero3"), ("fsdp2", "teacher=fsdp2")], ids=["ddp", "zero3", "fsdp2"]
)
def test_a_teacher_with_another_tokenizer_trains_two_ranks_as_one(root, results_of_one_rank, strategy):
    variants = ("other_tokenizer", *strategy)
    folder = root / "-".join(variants)
    one, two = results_of_one_rank("other_tokenizer"), run_script(folder, 2, *variants)
    assert_equal(two, one)
    assert one["metrics"]["eval_bits_per_byte"] > 0
    assert_same_plain_folder(folder / "straight-saved", root / "one-other_tokenizer" / "straight-saved")


@pytest.mark.parametrize("strategy", [(), ("zero2",), ("fsdp2", "teacher=fsdp2")], ids=["ddp", "zero2", "fsdp2"])
def test_compiled_blocks_on_two_ranks_train_as_uncompiled_ones_on_one(root, results_of_one_rank, strategy):
    """With activation checkpointing; each block is compiled once, for training, evaluation and their shapes."""
    folder = root / "-".join(["compile", *strategy])
    two = run_script(folder, 2, "compile", *strategy)
    assert_equal(two, results_of_one_rank())
    assert two["graph_breaks"] == 0 < two["graphs"] <= 12
    if strategy != ("fsdp2", "teacher=fsdp2"):
        assert_same_plain_folder(folder / "straight-saved", root / "one" / "straight-saved")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_nonfinite_step_on_one_rank_is_skipped_on_all_ranks(root, strategy):
    results = run_script(root / f"nonfinite-{strategy}", 2, strategy, "nonfinite")
    assert results["skipped"] == [2]


def test_a_nonfinite_step_stops_training_with_deepspeed(root):
    folder = root / "nonfinite-zero2"
    folder.mkdir()
    ended = run_on_ranks(2, SCRIPT, str(folder), "zero2", "nonfinite")
    assert ended.returncode != 0
    assert "Training stops at step 2 after 1 step with" in ended.stderr
    assert "could not be skipped" in ended.stderr


@pytest.mark.parametrize("fault", ["die", "hang"])
def test_a_rank_that_dies_or_hangs_ends_the_other_ranks(root, fault):
    """There is no launcher that would kill the other process."""
    (root / fault).mkdir()
    code, message = run_one_rank(0, SCRIPT, str(root / fault), "teacher=zero3", fault)
    assert code not in (0, -9)
    expected = r"timed out|timeout" if fault == "hang" else "by peer"
    assert re.search(expected, message, re.IGNORECASE), message[-3000:]
