"""Overridden private methods of transformers and TRL are listed, and versions that change them raise an error."""

import inspect

import pytest
from transformers import Seq2SeqTrainer, Trainer
from trl import DistillationTrainer, SFTTrainer

from hf_distill import DistillError, DistillSeq2SeqTrainer, DistillTrainer
from hf_distill.trainer import upstream
from hf_distill.trl import DistillSFTTrainer, OnPolicyDistillTrainer

PAIRS = [
    (DistillTrainer, Trainer),
    (DistillSeq2SeqTrainer, Seq2SeqTrainer),
    (DistillSFTTrainer, SFTTrainer),
    (OnPolicyDistillTrainer, DistillationTrainer),
]


@pytest.mark.parametrize(("trainer", "base"), PAIRS)
def test_an_overridden_private_method_cannot_miss_in_the_list(trainer, base):
    overridden = {
        name
        for cls in trainer.__mro__
        if cls.__module__.startswith("hf_distill")
        for name, value in vars(cls).items()
        if name.startswith("_") and not name.startswith("__") and inspect.isfunction(value) and hasattr(base, name)
    }
    assert overridden
    listed = upstream.TRAINER | (upstream.DISTILLATION_TRAINER if base is DistillationTrainer else {})
    assert overridden == listed.keys()


class Renamed:
    def _save_checkpoint_of(self, model, trial): ...

    def _save(self, folder, state_dict=None): ...


def test_a_renamed_method_or_parameter_raises_an_error():
    expected = {name: upstream.TRAINER[name] for name in ("_save_checkpoint", "_save")}
    with pytest.raises(DistillError, match=r"Renamed has no method _save_checkpoint; Renamed\._save takes \('folder'"):
        upstream.check_upstream("transformers", Renamed, expected)


@pytest.mark.parametrize("installed", ["5.22.2", "5.25.0", "6.0.0"])
def test_an_unsupported_version_raises_an_error_with_the_install_command(monkeypatch, installed):
    monkeypatch.setattr(upstream, "version", lambda package: installed)
    with pytest.raises(DistillError, match=rf"transformers {installed} is installed.*pip install \"transformers<5.25,"):
        upstream.check_upstream("transformers", Trainer, upstream.TRAINER)


def test_the_supported_versions_equal_those_of_setup_cfg():
    from configparser import ConfigParser
    from pathlib import Path

    config = ConfigParser()
    config.read(Path(upstream.__file__).parents[2] / "setup.cfg")
    assert upstream.SUPPORTED["transformers"] in config["options"]["install_requires"].split()
    assert upstream.SUPPORTED["trl"] in config["options.extras_require"]["trl"].split()
