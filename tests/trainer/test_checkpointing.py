"""Saving, rotating and loading checkpoints: full disks, interruptions, and weights that are not finite."""

import errno
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import build
from transformers import Trainer, TrainerState, TrainingArguments

from hf_distill import DistillError
from hf_distill.errors import RunError
from hf_distill.trainer import checkpointing as checkpointing
from hf_distill.trainer.checkpoint_loading import load_checkpoint_weights
from hf_distill.trainer.checkpointing import Checkpointer, _is_disk_full
from hf_distill.trainer.checkpoints import checkpoint_defect, checkpoints_of, latest_complete
from hf_distill.trainer.nonfinite_report import nonfinite_weight

RUN = ["run", "quickstart", "--smoke", "control=null", "train.output_dir=run"]
RUN += ["train.max_steps=12", "train.save_steps=1"]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 6 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_raises_an_error_and_keeps_earlier_checkpoints_complete(run_cli, monkeypatch, small_disk):
    monkeypatch.chdir(small_disk)
    full = run_cli(*RUN, "train.save_total_limit=null")
    assert full.returncode == 1
    assert "could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    newest = latest_complete(small_disk / "run")
    assert newest
    assert newest.name in full.stderr
    assert all((path / "trainer_state.json").is_file() for path in (small_disk / "run").glob("checkpoint-*"))
    for path in sorted((small_disk / "run").glob("checkpoint-*"))[:-1]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    resumed = run_cli(*RUN, "train.save_total_limit=1", "--resume")
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
def test_only_errors_of_a_full_disk_count_as_one(error, free, written, full):
    assert _is_disk_full(error, free, written) == full


def complete_names(folder):
    return [path.name for path in checkpoints_of(folder) if checkpoint_defect(path) is None]


@pytest.mark.parametrize("push", [False, True])
def test_a_limit_of_one_never_leaves_the_folder_without_a_complete_checkpoint(
    make_trainer, tmp_path, monkeypatch, push
):
    import hf_distill.trainer.checkpoints as checkpoints

    calls = []
    for name in ("mark_complete", "mark_incomplete", "rotate", "remove"):
        owner = checkpoints if name == "remove" else checkpointing
        original = getattr(owner, name)

        def watched(*args, name=name, original=original):
            calls.append((name, complete_names(tmp_path / "out")))
            original(*args)
            calls.append((name, complete_names(tmp_path / "out")))

        monkeypatch.setattr(owner, name, watched)
    monkeypatch.setattr(
        "transformers.Trainer._push_from_checkpoint",
        lambda self, folder: calls.append(("push", complete_names(tmp_path / "out"))),
    )
    monkeypatch.setattr("transformers.Trainer.init_hf_repo", lambda self, **_: setattr(self, "push_in_progress", None))
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=6, save_total_limit=1, push_to_hub=push)
    monkeypatch.setattr(trainer, "create_model_card", lambda: None)
    trainer.train()
    first = calls.index(("mark_complete", ["checkpoint-2"]))
    assert all(complete_checkpoints for _, complete_checkpoints in calls[first:])
    assert complete_names(tmp_path / "out") == ["checkpoint-6"]
    assert [complete_checkpoints[0] for name, complete_checkpoints in calls if name == "push"] == (
        ["checkpoint-2", "checkpoint-4", "checkpoint-6"] if push else []
    )
    assert trainer.args.save_total_limit == 1
    saved = torch.load(tmp_path / "out" / "checkpoint-6" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 1


def test_a_limit_of_one_leaves_the_best_checkpoint_after_training(make_trainer, tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    options |= {"save_total_limit": 1, "load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    trainer = make_trainer(greater_is_better=True, learning_rate=1e-2, **options)  # so that the first is the best
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert complete_names(tmp_path / "out") == ["checkpoint-2"]
    assert sorted(path.name for path in (tmp_path / "out").glob("*checkpoint-*")) == ["checkpoint-2"]


def test_the_checkpointer_marks_before_it_removes_without_a_trainer(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, save_total_limit=1)
    accelerator = SimpleNamespace(num_processes=1, wait_for_everyone=lambda: None)
    checkpointer, state = Checkpointer(), TrainerState()

    def write(step: int, error: Exception | None = None) -> None:
        folder = tmp_path / f"checkpoint-{step}"
        with checkpointer.writing(folder, args, accelerator, state):
            assert args.save_total_limit is None  # the Trainer removes no checkpoint
            assert checkpoint_defect(folder).state == "unfinished"
            with checkpointer.users_limit(args):
                assert args.save_total_limit == 1
            if error is not None:
                raise error
            state.save_to_json(str(folder / "trainer_state.json"))
        assert args.save_total_limit == 1

    write(1)
    with pytest.raises(RunError):
        write(2, RunError("weights"))
    assert complete_names(tmp_path) == ["checkpoint-1"] == [path.name for path in tmp_path.iterdir()]
    write(2)
    assert complete_names(tmp_path) == ["checkpoint-2"] == [path.name for path in tmp_path.iterdir()]
    newest = checkpointer.newest(args, accelerator)
    assert newest == tmp_path / "checkpoint-2"
    assert checkpointer.resolve(True, args, accelerator) == str(newest)
    (newest / "trainer_state.json").write_text("{}")
    with pytest.raises(DistillError, match=r"trainer_state\.json has 2 bytes"):
        Checkpointer().resolve(str(newest), args, accelerator)


def test_weights_are_loaded_completely_unless_the_trainer_has_to_load_them(tmp_path):
    saved, student = build("llama", 1), build("llama", 2)
    saved.save_pretrained(tmp_path)
    for plugin in ("fsdp_plugin", "deepspeed_plugin"):
        accelerator = SimpleNamespace(state=SimpleNamespace(**{plugin: object()}))
        assert not load_checkpoint_weights(student, str(tmp_path), accelerator)
    accelerator = SimpleNamespace(state=SimpleNamespace())
    student.hf_quantizer = object()
    assert not load_checkpoint_weights(student, str(tmp_path), accelerator)
    assert not torch.equal(student.lm_head.weight, saved.lm_head.weight)
    student.hf_quantizer = None
    assert load_checkpoint_weights(student, str(tmp_path), accelerator)
    assert all(torch.equal(student.state_dict()[name], value) for name, value in saved.state_dict().items())


def test_a_damaged_best_checkpoint_is_not_loaded(make_trainer, tmp_path, monkeypatch):
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "max_steps": 4}
    trainer = make_trainer(load_best_model_at_end=True, **options)
    original = Trainer._finalize_training

    def damage_first(self, *args):
        file = tmp_path / "out" / Path(self.state.best_model_checkpoint).name / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        return original(self, *args)

    monkeypatch.setattr(Trainer, "_finalize_training", damage_first)
    with pytest.raises(DistillError, match=r"best checkpoint .* cannot be loaded: .*model\.safetensors is damaged"):
        trainer.train()


@pytest.mark.parametrize("rate", [float("inf"), 1e38])
@pytest.mark.parametrize("save", ["steps", "no"])
def test_nonfinite_weights_are_not_saved(make_trainer, tmp_path, rate, save):
    trainer = make_trainer(save_strategy=save, save_steps=1, max_steps=1, learning_rate=rate)
    message = r"not finite after step 1 \(first: .*\)\. Nothing was written to"
    if save == "no":
        trainer.train()
        with pytest.raises(RunError, match=message):
            trainer.save_model()
    else:
        with pytest.raises(RunError, match=message):
            trainer.train()
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    assert not list((tmp_path / "out").glob("*checkpoint*"))


def test_training_stops_when_the_weights_become_nonfinite(make_trainer):
    trainer = make_trainer(max_steps=9, learning_rate=float("inf"), max_consecutive_nonfinite_steps=5)
    with pytest.raises(RunError, match=r"not finite after step 1 .*No further step"):
        trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_name_of_a_nonfinite_weight_is_found(dtype):
    model = build("llama").to(dtype)
    model.model.norm.weight.data.fill_(torch.finfo(dtype).max)  # large and finite
    model.register_buffer("mask", torch.full((3,), float("-inf")))
    assert nonfinite_weight(model) is None
    model.model.layers[1].mlp.up_proj.weight.data[3, 2] = float("nan")
    assert nonfinite_weight(model) == "model.layers.1.mlp.up_proj.weight"
