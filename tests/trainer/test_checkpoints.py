"""Incomplete and damaged checkpoints are recognized, whatever happened to them."""

import json
import logging
import random
import shutil

import pytest

from hf_distill import DistillError
from hf_distill.trainer.checkpoints import (
    MARK_FILE,
    checkpoint_defect,
    checkpoints_of,
    latest_complete,
    mark_complete,
    mark_incomplete,
    remove,
    restore,
    rotate,
)

OPTIONS = {"save_steps": 2, "save_strategy": "steps", "losses": [{"name": "hidden_mse"}]}


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory):
    """An output folder with two checkpoints."""
    from tiny import build, collate, rows

    from hf_distill import DistillConfig, DistillTrainer

    folder = tmp_path_factory.mktemp("run")
    arguments = {"max_steps": 4, "per_device_train_batch_size": 4, "dataloader_pin_memory": False}
    DistillTrainer(
        build("llama", 0),
        DistillConfig(str(folder), **arguments, **OPTIONS),
        teacher=build("llama", 1, layers=3, width=48),
        train_dataset=rows("llama", 32),
        data_collator=collate,
    ).train()
    return folder


@pytest.fixture
def folder(trained_folder, tmp_path):
    """A copy of the output folder."""
    shutil.copytree(trained_folder, tmp_path / "out")
    return tmp_path / "out"


def truncate(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def flip_bit(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def edit_mark(checkpoint, change):
    values = json.loads((checkpoint / MARK_FILE).read_text())
    change(values)
    (checkpoint / MARK_FILE).write_text(json.dumps(values))


def flip_middle_bit(path):
    flip_bit(path, path.stat().st_size * 4)


DAMAGE = {
    "not finished": lambda c: (c / MARK_FILE).write_text('{"whole": false}'),
    "half a mark": lambda c: truncate(c / MARK_FILE),
    "a list as mark": lambda c: (c / MARK_FILE).write_text("[]"),
    "a number as mark": lambda c: (c / MARK_FILE).write_text("5"),
    "a mark that is no text": lambda c: (c / MARK_FILE).write_bytes(b"\xff\xfe"),
    "a folder as mark": lambda c: ((c / MARK_FILE).unlink(), (c / MARK_FILE).mkdir()),
    "a mark without files": lambda c: edit_mark(c, lambda values: values.pop("files")),
    "a mark without the key whole": lambda c: edit_mark(c, lambda values: values.pop("whole")),
    "a mark without a file": lambda c: edit_mark(c, lambda values: values["files"].pop("optimizer.pt")),
    "a mark without a digest": lambda c: edit_mark(c, lambda values: values["files"]["optimizer.pt"].pop("xxh3_128")),
    "half the weights": lambda c: truncate(c / "model.safetensors"),
    "half an optimizer": lambda c: truncate(c / "optimizer.pt"),
    "half the projectors": lambda c: truncate(c / "sidecar.safetensors"),
    "an empty file": lambda c: truncate(c / "scheduler.pt", 0),
    "no random state": lambda c: (c / "rng_state.pth").unlink(),
    "no trainer state": lambda c: (c / "trainer_state.json").unlink(),
    "a bit of the weights": lambda c: flip_middle_bit(c / "model.safetensors"),
    "a bit of the optimizer": lambda c: flip_middle_bit(c / "optimizer.pt"),
    "a bit of the schedule": lambda c: flip_middle_bit(c / "scheduler.pt"),
    "a bit of the random state": lambda c: flip_middle_bit(c / "rng_state.pth"),
    "a bit of the trainer state": lambda c: flip_middle_bit(c / "trainer_state.json"),
    "a bit of the projectors": lambda c: flip_middle_bit(c / "sidecar.safetensors"),
    "a plain Trainer's checkpoint with half a state": lambda c: (
        (c / MARK_FILE).unlink(),
        truncate(c / "trainer_state.json"),
    ),
    "a plain Trainer's checkpoint with a list as state": lambda c: (
        (c / MARK_FILE).unlink(),
        (c / "trainer_state.json").write_text("[]"),
    ),
    "a plain Trainer's checkpoint without a state": lambda c: (
        (c / MARK_FILE).unlink(),
        (c / "trainer_state.json").unlink(),
    ),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_training_resumes_from_the_newest_complete_checkpoint(folder, make_trainer, damage, caplog):
    assert checkpoint_defect(folder / "checkpoint-4") is None
    DAMAGE[damage](folder / "checkpoint-4")
    defect = checkpoint_defect(folder / "checkpoint-4")
    assert defect
    trainer = make_trainer(max_steps=5, **OPTIONS)
    with pytest.raises(DistillError, match=r"cannot be resumed from .*checkpoint-4: .*checkpoint-2 is complete"):
        trainer.checkpointer.verify(folder / "checkpoint-4", trainer.args, trainer.accelerator)
    with caplog.at_level(logging.WARNING):
        assert trainer.newest_checkpoint() == folder / "checkpoint-2"
    assert f"checkpoint-4 is skipped: {defect.reason}" in caplog.text


def test_a_skipped_checkpoint_is_written_again(folder, make_trainer):
    flip_middle_bit(folder / "checkpoint-4" / "optimizer.pt")
    trainer = make_trainer(max_steps=5, **OPTIONS)
    with pytest.raises(DistillError, match=r"optimizer\.pt is damaged .*checkpoint-2 is complete"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2
    assert latest_complete(folder) == folder / "checkpoint-5"
    assert checkpoint_defect(folder / "checkpoint-4") is None


def test_any_flipped_bit_of_a_checkpoint_is_detected(folder):
    """A sample of the bits that `benchmarks/bit_flips.py` flips."""
    checkpoint, generator = folder / "checkpoint-4", random.Random(0)
    for path in sorted(checkpoint.iterdir()):
        for _ in range(10):
            bit = generator.randrange(path.stat().st_size * 8)
            flip_bit(path, bit)
            assert checkpoint_defect(checkpoint), f"bit {bit} of {path.name}"
            flip_bit(path, bit)
    assert checkpoint_defect(checkpoint) is None


def test_training_does_not_start_if_no_checkpoint_is_complete(folder, make_trainer, caplog):
    """Training would overwrite checkpoints that might be repaired; interrupted ones cannot be repaired."""
    for checkpoint in checkpoints_of(folder):
        truncate(checkpoint / "optimizer.pt")
    trainer = make_trainer()
    message = r"no checkpoint is complete .*checkpoint-2: optimizer\.pt has .* instead"
    with caplog.at_level(logging.WARNING), pytest.raises(DistillError, match=message) as error:
        trainer.train(resume_from_checkpoint=True)
    assert "is skipped" not in caplog.text  # only the error names them
    assert "delete" not in str(error.value)  # the message must not suggest to delete the mark of a damaged checkpoint
    for checkpoint in checkpoints_of(folder):
        mark_incomplete(checkpoint)
    assert trainer.newest_checkpoint() is None
    with pytest.raises(DistillError, match=r"writing it was interrupted, and no other .* Start again"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(folder="elsewhere").train(resume_from_checkpoint=True)


def test_a_kill_before_the_first_mark_does_not_block_the_next_run(make_trainer, tmp_path):
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / f"{MARK_FILE}.half").write_text('{"wh')
    trainer = make_trainer(max_steps=2, save_steps=2, save_strategy="steps")
    assert trainer.newest_checkpoint() is None
    trainer.train()
    assert checkpoint_defect(tmp_path / "out" / "checkpoint-2") is None


def test_a_resharded_checkpoint_is_loaded_after_its_mark_is_deleted(folder, make_trainer):
    from transformers import AutoModelForCausalLM

    checkpoint = folder / "checkpoint-4"
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    (checkpoint / "model.safetensors").unlink()
    model.save_pretrained(checkpoint, max_shard_size="20KB")
    assert len(list(checkpoint.glob("model-*.safetensors"))) > 1
    trainer = make_trainer(max_steps=5, **OPTIONS)
    with pytest.raises(DistillError, match=r"If you changed it on purpose, delete .*checkpoint-4/checkpoint\.json"):
        trainer.newest_checkpoint()
    (checkpoint / MARK_FILE).unlink()
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 4


def test_a_checkpoint_of_a_plain_trainer_is_loaded(make_trainer, tmp_path):
    from transformers import Trainer

    make_trainer(cls=Trainer, max_steps=2, save_steps=2, save_strategy="steps").train()
    assert not (tmp_path / "out" / "checkpoint-2" / MARK_FILE).exists()
    trainer = make_trainer(max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2


def test_files_of_an_interrupted_attempt_are_removed(tmp_path):
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / "model-00003-of-00003.safetensors").write_bytes(b"old")
    mark_incomplete(checkpoint)
    assert [path.name for path in checkpoint.iterdir()] == [MARK_FILE]
    assert checkpoint_defect(checkpoint).state == "unfinished"
    (checkpoint / "trainer_state.json").write_text("{}")
    mark_complete(checkpoint)
    (entry,) = json.loads((checkpoint / MARK_FILE).read_text())["files"].values()
    assert entry["size"] == 2
    assert checkpoint_defect(checkpoint) is None


def test_a_complete_checkpoint_is_restored_if_its_replacement_is_unfinished(tmp_path):
    checkpoint = tmp_path / "checkpoint-8"
    for state in ("{}", '{"epoch": 1}'):
        mark_incomplete(checkpoint)
        (checkpoint / "trainer_state.json").write_text(state)
        if state == "{}":
            mark_complete(checkpoint)
    assert checkpoint_defect(checkpoint).state == "unfinished"
    restore(tmp_path)
    assert checkpoint_defect(checkpoint) is None
    assert (checkpoint / "trainer_state.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_a_partly_removed_checkpoint_does_not_look_complete(folder, monkeypatch):
    """If the mark is deleted first, the rest looks like a checkpoint of a plain Trainer."""

    def interrupted(path, **_):
        if path.exists():
            (path / MARK_FILE).unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            remove(folder / "checkpoint-4")
    assert [path.name for path in checkpoints_of(folder)] == ["checkpoint-2"]
    restore(folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("limit", "best", "remaining"),
    [
        (None, None, "2468"),
        (1, None, "8"),
        (2, None, "68"),
        (1, "2", "28"),
        (2, "4", "48"),
        (3, "2", "268"),
        (9, "2", "2468"),
    ],
)
def test_rotation_removes_the_checkpoints_that_transformers_removes(tmp_path, limit, best, remaining):
    from transformers.trainer_utils import rotate_checkpoints

    for parent in ("ours", "theirs"):
        for step in (2, 4, 6, 8):
            (tmp_path / parent / f"checkpoint-{step}").mkdir(parents=True)
    ours, theirs = ((tmp_path / parent) for parent in ("ours", "theirs"))
    rotate(ours, ours / "checkpoint-8", limit, best and str(ours / f"checkpoint-{best}"))
    rotate_checkpoints(str(theirs), limit, best and str(theirs / f"checkpoint-{best}"), use_mtime=True)
    assert sorted(path.name for path in ours.iterdir()) == sorted(path.name for path in theirs.iterdir())
    assert "".join(path.name[-1] for path in sorted(ours.iterdir())) == remaining


def test_rotation_of_checkpoints_with_equal_times_logs_no_warning(tmp_path, monkeypatch):
    from transformers import trainer_utils

    logged = []
    monkeypatch.setattr(trainer_utils.logger, "handlers", [handler := logging.Handler()])
    monkeypatch.setattr(handler, "handle", lambda record: logged.append(record.getMessage()))
    type(trainer_utils.logger).warning_once.cache_clear()  # so that the warning would be logged again
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, tmp_path / "checkpoint-4", 1, None)
    assert logged == []
    type(trainer_utils.logger).warning_once.cache_clear()
    trainer_utils.sort_checkpoints(str(tmp_path), use_mtime=True)
    (tmp_path / "checkpoint-6").mkdir()
    trainer_utils.sort_checkpoints(str(tmp_path), use_mtime=True)
    assert len(logged) == 1


def test_checkpoints_are_ordered_by_their_step(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-10", "checkpoint-2"]
    assert latest_complete(tmp_path / "nowhere") is None


@pytest.mark.parametrize("kind", ["files of the user", "a checkpoint with an added file"])
def test_files_of_the_user_in_a_checkpoint_folder_are_kept(make_trainer, tmp_path, kind):
    """A plain Trainer writes into an existing folder and keeps what else is in it."""
    folder = tmp_path / "out" / "checkpoint-2"
    if kind == "files of the user":
        (folder / "plots").mkdir(parents=True)
    else:
        make_trainer(max_steps=2, save_strategy="steps", save_steps=2).train()
        (folder / "plots").mkdir()
    for name in ("mine.txt", "plots/loss.txt"):
        (folder / name).write_text("mine")
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    assert [(folder / name).read_text() for name in ("mine.txt", "plots/loss.txt")] == ["mine", "mine"]
    assert checkpoint_defect(folder) is None
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checkpoint-2"]
