"""A complete checkpoint is there at any moment: full disks, rotation, weights that are not finite."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import build

from hf_distill import DistillError
from hf_distill.errors import RunError
from hf_distill.trainer import checkpointing as saving
from hf_distill.trainer.checkpointing import _for_want_of_room
from hf_distill.trainer.checkpoints import checkpoint_defect, checkpoints_of, latest_complete
from hf_distill.trainer.nonfinite_report import nonfinite_weight

RUN = ["run", "quickstart", "--smoke", "control=null", "train.output_dir=run"]
RUN += ["train.max_steps=12", "train.save_steps=1"]


def program(folder, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_distill", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path):
    """A disk of 6 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_earlier_checkpoints_stay_whole(small):
    full = program(small, *RUN, "train.save_total_limit=null")
    assert full.returncode == 1
    assert "could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    newest = latest_complete(small / "run")
    assert newest
    assert newest.name in full.stderr
    assert all((path / "trainer_state.json").is_file() for path in (small / "run").glob("checkpoint-*"))
    for path in sorted((small / "run").glob("checkpoint-*"))[:-1]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    resumed = program(small, *RUN, "train.save_total_limit=1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {newest.name.rpartition('-')[2]} " in resumed.stdout


@pytest.mark.parametrize(
    ("error", "free", "written", "full"),
    [
        (OSError(errno.ENOSPC, "x"), 1 << 40, 0, True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1 << 40, 0, True),
        (RuntimeError("unexpected pos"), 5_000_000, 9_000_000, True),
        (RuntimeError("unexpected pos"), 1 << 40, 9_000_000, False),
        (PermissionError(errno.EACCES, "x"), 1 << 40, 0, False),
    ],
)
def test_other_errors_are_not_taken_for_a_full_disk(error, free, written, full):
    assert _for_want_of_room(error, free, written) == full


def complete(folder):
    return [path.name for path in checkpoints_of(folder) if checkpoint_defect(path) is None]


@pytest.mark.parametrize("push", [False, True])
def test_with_a_limit_of_one_a_complete_checkpoint_is_there_at_every_removal_and_seal(
    make_trainer, tmp_path, monkeypatch, push
):
    import hf_distill.trainer.checkpoints as checkpoints

    seen = []
    for name in ("seal", "begin", "rotate", "remove"):
        owner = checkpoints if name == "remove" else saving
        original = getattr(owner, name)

        def watched(*args, name=name, original=original):
            seen.append((name, complete(tmp_path / "out")))
            original(*args)
            seen.append((name, complete(tmp_path / "out")))

        monkeypatch.setattr(owner, name, watched)
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint",
        lambda self, folder: seen.append(("push", complete(tmp_path / "out"))),
    )
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, **_: setattr(self, "push_in_progress", None))
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=6, save_total_limit=1, push_to_hub=push)
    monkeypatch.setattr(trainer, "create_model_card", lambda: None)
    trainer.train()
    first = seen.index(("seal", ["checkpoint-2"]))
    assert all(there for _, there in seen[first:])
    assert complete(tmp_path / "out") == ["checkpoint-6"]
    assert [there[0] for name, there in seen if name == "push"] == (
        ["checkpoint-2", "checkpoint-4", "checkpoint-6"] if push else []
    )
    assert trainer.args.save_total_limit == 1
    saved = torch.load(tmp_path / "out" / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1


def test_best_checkpoint_is_all_that_a_limit_of_one_leaves_at_the_end(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(greater_is_better=True, learning_rate=1e-2, **options)  # so that the first is the best
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert complete(tmp_path / "out") == ["checkpoint-2"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*")) == ["checkpoint-2"]


def test_a_damaged_best_checkpoint_is_not_loaded(make_trainer, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = make_trainer(load_best_model_at_end=True, **options)
    original = saving.CheckpointMixin._finalize_training

    def damage_first(self, *args):
        file = tmp_path / "out" / Path(self.state.best_model_checkpoint).name / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return original(self, *args)

    monkeypatch.setattr(saving.CheckpointMixin, "_finalize_training", damage_first)
    with pytest.raises(DistillError, match=r"model\.safetensors is damaged"):
        trainer.train()


@pytest.mark.parametrize("rate", [float("inf"), 1e38])
@pytest.mark.parametrize("save", ["steps", "no"])
def test_weights_that_are_not_finite_are_not_saved(make_trainer, tmp_path, rate, save):
    trainer = make_trainer(save_strategy=save, save_steps=1, max_steps=1, learning_rate=rate)
    message = r"not finite after step 1 \(first: .*\)\. Nothing is written to"
    if save == "no":
        trainer.train()
        with pytest.raises(RunError, match=message):
            trainer.save_model()
    else:
        with pytest.raises(RunError, match=message):
            trainer.train()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").glob("*checkpoint*"))


def test_training_stops_at_once_where_a_step_made_weights_not_finite(make_trainer):
    trainer = make_trainer(max_steps=9, learning_rate=float("inf"), max_consecutive_nonfinite_steps=5)
    with pytest.raises(RunError, match=r"not finite after step 1 .*No further step"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(dtype):
    model = build("llama").to(dtype)
    model.model.norm.weight.data.fill_(torch.finfo(dtype).max)  # large and finite
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    assert nonfinite_weight(model) is None
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    assert nonfinite_weight(model) == "model.layers.1.mlp.up_proj.weight"
