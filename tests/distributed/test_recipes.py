"""Packaged recipes for large teachers run with tiny models on two processes, with their sharding strategies."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from launching import ENVIRONMENT, TORCHRUN, Ended, run_on_ranks
from transformers import AutoModelForCausalLM

from hf_distill.recipe import load_recipe

OFFLOAD = ["teacher.deepspeed=zero3-teacher-offload.json", "train.deepspeed=zero3-student-offload.json"]


def run_recipe(folder: Path, *arguments: str, ranks: int = 2) -> Ended:
    return run_on_ranks(ranks, "-m", "hf_distill", "run", *arguments, folder=folder)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("llama-70b-to-8b-zero3", ["control=sft"]),
        ("llama-70b-to-8b-zero3", OFFLOAD),
        ("qwen-72b-to-7b-fsdp2", []),
        ("llama-70b-to-8b-nf4", ["train.deepspeed=zero2-student.json", "student.quantization=nf4"]),
    ],
    ids=["zero3", "offload", "fsdp2", "qlora-zero2"],
)
def test_a_recipe_for_a_large_teacher_runs_with_its_sharding_strategy(tmp_path, recipe, overrides):
    done = run_recipe(tmp_path, recipe, "--smoke", "train.output_dir=run", *overrides)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("Metrics on held-out rows") == 1  # only one process prints
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["status"] == "done"
    assert results["teacher"]["layers"] == 4
    assert results["teacher"]["parameters"] > results["student"]["parameters"] > 30_000
    for name in {"student", "control"} & {p.name for p in (tmp_path / "run").iterdir()}:
        loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / name, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert all(p.numel() for p in loaded.parameters())
    again = run_recipe(tmp_path, recipe, "--smoke", "--resume", "train.output_dir=run", *overrides)
    assert again.returncode == 0
    assert "This run is complete already." in again.stdout


def test_a_folder_of_another_run_raises_one_error_for_all_processes(tmp_path):
    (tmp_path / "run").mkdir()
    other = load_recipe("quickstart", ["train.output_dir=run"], smoke=True).model_dump(exclude_none=True)
    (tmp_path / "run" / "recipe.yaml").write_text(yaml.safe_dump(other))
    done = run_recipe(tmp_path, "llama-70b-to-8b-zero3", "--smoke", "--resume", "train.output_dir=run")
    assert done.returncode != 0
    assert done.stderr.count("holds a run of another recipe") == 1


SCRIPT_WITH_DIFFERENT_RECIPES = """
import os, sys
from hf_distill.cli import main
length = 64 + 2 * int(os.environ["RANK"])
words = ["run", "quickstart", "--smoke", "control=null", "train.output_dir=run", f"data.max_length={length}"]
sys.argv = ["hf-distill", *words]
main()
"""


def test_processes_with_different_recipes_or_rows_raise_an_error_before_training(tmp_path):
    (tmp_path / "parted.py").write_text(SCRIPT_WITH_DIFFERENT_RECIPES)
    done = run_on_ranks(2, str(tmp_path / "parted.py"), folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("The processes of this launch differ") == 1
    assert "training rows: " in done.stderr
    assert "on rank 0, " in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("streaming", [True, False], ids=["stream", "map"])
def test_two_processes_train_on_the_same_rows_as_one(tmp_path, streaming):
    """Equal losses on a mixture show that every global batch has the same rows."""
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" It is {i + i}."} for i in range(60)]
    for name, part in (("sums", rows[:52]), ("test", rows[52:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    sums = f"{{path: sums.jsonl, weight: 0.5, streaming: {json.dumps(streaming)}}}"
    common = ["quickstart", "--smoke", f"data.sums={sums}", "data.eval={path: test.jsonl}", "control=null"]
    common += ["student={model: 'smoke:llama/student'}", "train.max_steps=3"]
    two = run_recipe(tmp_path, *common, "train.output_dir=two", "train.per_device_train_batch_size=2")
    assert two.returncode == 0, two.stderr[-4000:]
    one = run_recipe(tmp_path, *common, "train.output_dir=one", "train.per_device_train_batch_size=4", ranks=1)
    assert one.returncode == 0, one.stderr[-4000:]
    names = ("loss", "soft_loss", "hard_loss", "soft_loss_sums", "soft_loss_task", "grad_norm")
    values = {}
    for run in ("one", "two"):
        lines = [json.loads(line) for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        values[run] = [line[name] for line in lines if "loss" in line for name in names if name in line]
    assert len(values["one"]) > 12
    assert values["two"] == pytest.approx(values["one"], rel=1e-4)


ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]


@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_launchers_run_a_recipe(tmp_path, launcher):
    command = [*launcher, "-m", "hf_distill", "run", "quickstart", "--smoke", "control=null", "train.output_dir=run"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "changes",
    [["prune-width"], ["quickstart", "student={from_teacher: {keep_layers: 2, vocab: {keep: used}}}"]],
    ids=["pruned-width", "trimmed-vocabulary"],
)
def test_two_processes_prune_and_train_the_same_student_as_one(tmp_path, changes):
    """Importance is measured, or ids are counted, once or on every rank: the kept units and the losses are equal."""
    recipe, *overrides = changes
    common = [recipe, "--smoke", *overrides, "control=null", "train.max_steps=3"]
    two = run_recipe(tmp_path, *common, "train.output_dir=two", "train.per_device_train_batch_size=2")
    assert two.returncode == 0, two.stderr[-4000:]
    one = run_recipe(tmp_path, *common, "train.output_dir=one", "train.per_device_train_batch_size=4", ranks=1)
    assert one.returncode == 0, one.stderr[-4000:]
    configs, losses, kept = [], [], []
    for run in (tmp_path / "one", tmp_path / "two"):
        configs.append(json.loads((run / "student" / "config.json").read_text()))
        kept.append(json.loads((run / "pruning.json").read_text())["kept"])
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line[name] for line in lines for name in ("loss", "grad_norm", "eval_kl") if name in line])
        AutoModelForCausalLM.from_pretrained(run / "student")
    assert configs[0] == configs[1]
    assert kept[0] == kept[1]
    assert len(losses[0]) >= 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
