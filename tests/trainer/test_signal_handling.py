"""SIGTERM saves, stops, and costs nothing; so does the first Ctrl-C, and the second one ends the run at once."""

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


class Signal(TrainerCallback):
    """Sends signals to this process at a step."""

    def __init__(self, step, *numbers):
        self.step, self.numbers = step, numbers

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def left(folder) -> tuple[dict, dict, list]:
    """Weights, held-out metrics and training logs of a run."""
    models = {
        name: {k: v for k, v in metrics.items() if k != "train_seconds"}
        for name, metrics in read_json(folder / "results.json")["models"].items()
    }
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logs = [{k: v for k, v in log.items() if k != "epoch"} for log in logs if "loss" in log]
    return {name: load_file(folder / name / "model.safetensors") for name in ("student", "control")}, models, logs


def same(one, other) -> bool:
    weights = all(one[0][m][n].equal(value) for m in one[0] for n, value in other[0][m].items())
    return weights and one[1:] == other[1:]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight") / "run"
    run_recipe(recipe(folder))
    return left(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [0, 2, STEPS - 1])
def test_a_signal_saves_and_stops_and_a_resumed_run_ends_as_if_nothing_had_been(tmp_path, straight, number, step):
    before, told = signal.getsignal(number), []
    with pytest.raises(RunInterrupted) as stopped:
        run_recipe(recipe(tmp_path), callbacks=[Signal(step, number)], on_stage=told.append)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert f"Stopped by {number.name} after step {step + 1} of {STEPS}; checkpoint-{step + 1} is whole" in told[-1]
    assert latest_complete(tmp_path).name == f"checkpoint-{step + 1}"
    assert not (tmp_path / "student").exists()
    run_recipe(recipe(tmp_path), resume=True)
    assert same(left(tmp_path), straight)


def test_the_control_is_interrupted_and_goes_on_too(tmp_path, straight):
    seen = []

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if args.output_dir.endswith("control") and state.global_step == 3 and not seen:
                seen.append(os.kill(os.getpid(), signal.SIGTERM))

    with pytest.raises(RunInterrupted):
        run_recipe(recipe(tmp_path), callbacks=[Second()])
    assert latest_complete(tmp_path / "control").name == "checkpoint-4"
    run_recipe(recipe(tmp_path), resume=True)
    assert same(left(tmp_path), straight)


def test_where_nothing_is_saved_it_is_said(tmp_path):
    told, callbacks = [], [Signal(1, signal.SIGTERM)]
    with pytest.raises(RunInterrupted):
        run_recipe(recipe(tmp_path, "train.save_strategy=no"), callbacks=callbacks, on_stage=told.append)
    assert "save_strategy is no: nothing is kept" in told[-1]


def test_while_loading_it_stops_at_once_and_leaves_nothing(tmp_path):
    def on_stage(text):
        if text.startswith("Loading"):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        run_recipe(recipe(tmp_path / "run"), on_stage=on_stage)
    assert not (tmp_path / "run").exists()


def test_in_a_thread_signals_are_left_alone(tmp_path):
    before, threads = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: threads.append(run_recipe(recipe(tmp_path, "control=null"))))
    thread.start()
    thread.join()
    assert threads[0].models["student"]
    assert signal.getsignal(signal.SIGTERM) == before


def started(folder, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "hf_distill", "run", "quickstart", "--smoke", "train.output_dir=run", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_a_step(folder) -> None:
    """Until the first step is logged."""
    file, end = folder / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (file.is_file() and '"loss"' in file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_the_program_stops_cleanly_and_goes_on(tmp_path):
    words = ["control=null", "train.max_steps=200", "train.save_steps=5000", "train.logging_steps=1"]
    process = started(tmp_path, *words)
    wait_for_a_step(tmp_path)
    process.send_signal(signal.SIGTERM)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Stopped by SIGTERM after step" in out
    assert "Traceback" not in errors
    step = int(latest_complete(tmp_path / "run").name.rpartition("-")[2])
    resumed = started(tmp_path, *words, "--resume")
    out, errors = resumed.communicate(timeout=120)
    assert resumed.returncode == 0, errors
    assert f"from step {step} of 200" in out


def test_a_second_ctrl_c_ends_the_program_at_once(tmp_path):
    """Even in an evaluation that would take minutes; what was half written is known for it."""
    words = ["control=null", "train.max_steps=5000", "train.save_steps=1", "train.logging_steps=1"]
    process = started(tmp_path, *words, "train.save_total_limit=null")
    wait_for_a_step(tmp_path)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (-signal.SIGINT, 130)
    process.communicate()
    assert all(
        checkpoint_defect(c) in (None, "it was not written to its end") for c in (tmp_path / "run").glob("checkpoint-*")
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_script_stops_after_the_step_if_it_asks_for_it(make_trainer, tmp_path, number):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 100, "stop_on_signal": True}
    before = signal.getsignal(number)
    trainer = make_trainer(**options)
    trainer.add_callback(Signal(2, number))
    with pytest.raises(RunInterrupted) as stopped:
        trainer.train()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert latest_complete(tmp_path / "out").name == "checkpoint-3"
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert signal.getsignal(number) == before


def test_a_script_that_does_not_ask_keeps_its_own_handlers(make_trainer):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        trainer = make_trainer(max_steps=3)
        trainer.add_callback(Signal(1, signal.SIGTERM))
        trainer.train()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM]
    assert trainer.state.global_step == 3
