"""Models are loaded on the accelerator of the machine; Apple GPUs have no float64 and are not used."""

import pytest
import torch

from hf_distill import DistillConfig
from hf_distill.core.devices import default_device
from hf_distill.recipe import load_recipe
from hf_distill.runner import training_arguments
from hf_distill.trainer.validation import incompatible_arguments


@pytest.mark.parametrize(
    ("accelerator", "device"), [(None, "cpu"), ("mps", "cpu"), ("cuda", "cuda:1"), ("xpu", "xpu:1")]
)
def test_the_default_device_has_float64(accelerator, device, monkeypatch):
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: found)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)
    assert default_device() == torch.device(device)


def test_an_apple_gpu_is_refused_with_the_way_to_the_cpu(make_trainer, monkeypatch):
    trainer = make_trainer()
    assert incompatible_arguments(trainer) == []
    monkeypatch.setattr(DistillConfig, "device", torch.device("mps"))
    (problem,) = incompatible_arguments(trainer)
    assert "Apple GPUs (mps) do not have" in problem
    assert "use_cpu=True" in problem


@pytest.mark.parametrize(("given", "warns"), [({}, True), ({"use_cpu": True}, False)])
def test_a_recipe_on_an_apple_gpu_says_that_it_runs_on_the_cpu(given, warns, monkeypatch, tmp_path):
    warnings = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(training_arguments, "default_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(training_arguments.logger, "warning_once", warnings.append)
    overrides = [f"train.{name}={value}" for name, value in given.items()]
    recipe = load_recipe("quickstart", [f"train.output_dir={tmp_path}", *overrides], smoke=True)
    assert training_arguments.train_arguments(recipe)["use_cpu"]
    assert any("runs on the CPU" in text for text in warnings) is warns
