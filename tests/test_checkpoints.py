"""A checkpoint that is not whole is known for it, whatever happened to it."""

import json
import logging
import shutil

import pytest

from hf_distill import DistillError
from hf_distill.checkpoints import SEAL, begin, checkpoints_of, flaw, newest_whole, seal


@pytest.fixture
def folder(make_trainer, tmp_path):
    """Two checkpoints of a run."""
    make_trainer(max_steps=4, save_steps=2, save_strategy="steps", losses=[{"name": "hidden_mse"}]).train()
    return tmp_path / "out"


def cut(path, share=0.5):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


DAMAGE = {
    "not ended": lambda c: (c / SEAL).write_text('{"whole": false}'),
    "half a seal": lambda c: cut(c / SEAL),
    "half the weights": lambda c: cut(c / "model.safetensors"),
    "half an optimizer": lambda c: cut(c / "optimizer.pt"),
    "half the projectors": lambda c: cut(c / "sidecar.safetensors"),
    "an empty file": lambda c: cut(c / "scheduler.pt", 0),
    "no random state": lambda c: (c / "rng_state.pth").unlink(),
    "no trainer state": lambda c: (c / "trainer_state.json").unlink(),
    "another Trainer's, half a state": lambda c: ((c / SEAL).unlink(), cut(c / "trainer_state.json")),
    "another Trainer's, no state": lambda c: ((c / SEAL).unlink(), (c / "trainer_state.json").unlink()),
    "an empty folder": lambda c: (shutil.rmtree(c), c.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_training_goes_on_from_the_newest_that_is_whole(folder, make_trainer, damage, caplog):
    assert newest_whole(folder) == folder / "checkpoint-4"
    DAMAGE[damage](folder / "checkpoint-4")
    assert flaw(folder / "checkpoint-4")
    assert newest_whole(folder) == folder / "checkpoint-2"
    options = {"max_steps": 5, "save_steps": 2, "save_strategy": "steps", "losses": [{"name": "hidden_mse"}]}
    with pytest.raises(DistillError, match=r"cannot be resumed from .*checkpoint-4: .*checkpoint-2 is whole"):
        make_trainer(**options).train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    trainer = make_trainer(**options)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-4 is skipped: " in caplog.text
    assert trainer._initial_global_step == 2
    assert newest_whole(folder) == folder / "checkpoint-5"
    assert flaw(folder / "checkpoint-4") is None  # written anew


def test_where_none_is_whole_it_is_said(folder, make_trainer):
    for checkpoint in checkpoints_of(folder):
        cut(checkpoint / "optimizer.pt")
    with pytest.raises(DistillError, match=r"optimizer\.pt has .* bytes, of .* No other is whole: start again"):
        make_trainer().train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="No valid checkpoint"):
        make_trainer(folder="elsewhere").train(resume_from_checkpoint=True)


def test_a_plain_trainers_checkpoint_is_taken(make_trainer, tmp_path):
    from transformers import Trainer

    make_trainer(cls=Trainer, max_steps=2, save_steps=2, save_strategy="steps").train()
    assert not (tmp_path / "out" / "checkpoint-2" / SEAL).exists()
    trainer = make_trainer(max_steps=3)
    trainer.train(resume_from_checkpoint=True)
    assert trainer._initial_global_step == 2


def test_what_an_earlier_attempt_left_is_not_mixed_in(tmp_path):
    checkpoint = tmp_path / "checkpoint-8"
    checkpoint.mkdir()
    (checkpoint / "model-00003-of-00003.safetensors").write_bytes(b"old")
    begin(checkpoint)
    assert [path.name for path in checkpoint.iterdir()] == [SEAL]
    assert "not written to its end" in flaw(checkpoint)
    (checkpoint / "trainer_state.json").write_text("{}")
    seal(checkpoint)
    assert json.loads((checkpoint / SEAL).read_text()) == {"whole": True, "files": {"trainer_state.json": 2}}
    assert flaw(checkpoint) is None


def test_checkpoints_are_ordered_by_their_step(tmp_path):
    for name in ("checkpoint-2", "checkpoint-10", "checkpoint-x", "checkpoints"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-12").write_text("a file")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-10", "checkpoint-2"]
    assert newest_whole(tmp_path / "nowhere") is None
