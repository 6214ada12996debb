"""SIGTERM and the first Ctrl-C save a checkpoint and stop the run; a second Ctrl-C ends it at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from hf_distill.core.io import read_json
from hf_distill.errors import RunInterrupted
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.trainer.checkpoints import checkpoint_defect, latest_complete

STEPS = 8


def recipe(folder, *overrides):
    return load_recipe(
        "quickstart",
        [
            *(f"train.output_dir={folder}", f"train.max_steps={STEPS}", "train.save_steps=100"),
            *("train.logging_steps=1", "train.lr_scheduler_type=constant", *overrides),
        ],
        smoke=True,
    )


class SendSignals(TrainerCallback):
    """Sends signals to this process at a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def outputs_of(folder) -> tuple[dict, dict, list]:
    """Return weights, held-out metrics and training logs of a run."""
    models = {
        name: {k: v for k, v in metrics.items() if k != "train_seconds"}
        for name, metrics in read_json(folder / "results.json")["models"].items()
    }
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [{k: v for k, v in log.items() if k != "epoch"} for log in logs if "loss" in log]
    return {name: load_file(folder / name / "model.safetensors") for name in ("student", "control")}, models, logs


def have_equal_outputs(one, other) -> bool:
    weights = all(one[0][m][n].equal(value) for m in one[0] for n, value in other[0][m].items())
    return weights and one[1:] == other[1:]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_recipe(recipe(folder))
    return outputs_of(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_a_run_that_a_signal_stopped_resumes_exactly(tmp_path, uninterrupted, number, step):
    before, messages = signal.getsignal(number), []
    with pytest.raises(RunInterrupted) as stopped:
        run_recipe(recipe(tmp_path), callbacks=[SendSignals(step, number)], on_stage=messages.append)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert (
        f"Stopped by {number.name} after step {step + 1} of {STEPS}; checkpoint-{step + 1} is complete" in messages[-1]
    )
    assert latest_complete(tmp_path).name == f"checkpoint-{step + 1}"
    assert not (tmp_path / "student").exists()
    run_recipe(recipe(tmp_path), resume=True)
    assert have_equal_outputs(outputs_of(tmp_path), uninterrupted)


def test_a_run_that_a_signal_stopped_in_the_control_resumes_exactly(tmp_path, uninterrupted):
    received = []

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith("control") and state.global_step == 3 and not received:
                received.append(os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(RunInterrupted):
        run_recipe(recipe(tmp_path), callbacks=[Second()])
    assert latest_complete(tmp_path / "control").name == "checkpoint-4"
    run_recipe(recipe(tmp_path), resume=True)
    assert have_equal_outputs(outputs_of(tmp_path), uninterrupted)


def test_the_message_says_that_no_checkpoint_is_saved(tmp_path):
    messages, callbacks = [], [SendSignals(1, signal.SIGTERM)]
    with pytest.raises(RunInterrupted):
        run_recipe(recipe(tmp_path, "train.save_strategy=no"), callbacks=callbacks, on_stage=messages.append)
    assert 'No checkpoint was saved, because save_strategy is "no"' in messages[-1]


def test_a_signal_while_loading_stops_at_once_and_leaves_no_folder(tmp_path):
    def on_stage(text):
        if text.startswith("Loading"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        run_recipe(recipe(tmp_path / "run"), on_stage=on_stage)
    assert not (tmp_path / "run").exists()


def test_a_run_in_a_thread_does_not_change_signal_handlers(tmp_path):
    before, threads = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: threads.append(run_recipe(recipe(tmp_path, "control=null"))))
    thread.start()
    thread.join()
    assert threads[0].models["student"]
    assert signal.getsignal(signal.SIGTERM) == before


def start_cli(folder, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_distill", "run", "quickstart", "--smoke", "train.output_dir=run", *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_first_log(folder) -> None:
    """Wait until the first step is logged."""
    file, end = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (file.is_file() and '"loss"' in file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_cli_stops_with_a_checkpoint_and_resumes(tmp_path):
    arguments = ["control=null", "train.max_steps=40", "train.save_steps=5000", "train.logging_steps=1"]
    process = start_cli(tmp_path, *arguments)
    wait_for_first_log(tmp_path)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 143
    assert "Stopped by SIGTERM after step" in out
    assert "Traceback" not in errors
    step = int(latest_complete(tmp_path / "run").name.rpartition("-")[2])
    resumed = start_cli(tmp_path, *arguments, "--resume")
    out, errors = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, errors
    assert f"from step {step} of 40" in out


def test_a_second_ctrl_c_ends_the_cli_at_once(tmp_path):
    """A checkpoint that was not finished is recognized as incomplete."""
    arguments = ["control=null", "train.max_steps=5000", "train.save_steps=1", "train.logging_steps=1"]
    process = start_cli(tmp_path, *arguments, "train.save_total_limit=null")
    wait_for_first_log(tmp_path)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (-signal.SIGINT, 130)
    process.communicate()
    defects = [checkpoint_defect(path) for path in (tmp_path / "run").glob("checkpoint-*")]
    assert all(defect is None or defect.state == "unfinished" for defect in defects)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_on_signal_stops_after_the_step_and_resumes(make_trainer, tmp_path, number):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "stop_on_signal": True}
    before = signal.getsignal(number)
    trainer = make_trainer(**options)
    trainer.add_callback(SendSignals(2, number))
    with pytest.raises(RunInterrupted) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert latest_complete(tmp_path / "out").name == "checkpoint-3"
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert signal.getsignal(number) == before


def test_without_stop_on_signal_the_handlers_stay(make_trainer):
    received = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        trainer = make_trainer(max_steps=3)
        trainer.add_callback(SendSignals(1, signal.SIGTERM))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert trainer.state.global_step == 3
