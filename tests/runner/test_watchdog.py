"""When a rank counts as waiting: in code that waits for others, and in a step or evaluation that does not go on."""

import sys
from itertools import count, cycle
from types import SimpleNamespace

import pytest
from tiny import rows
from transformers import TrainerCallback

from hf_distill.runner import watchdog
from hf_distill.runner.watchdog import HangWatchdog

STACK = (("nonfinite.py", 76, "check_step"), ("trainer.py", 190, "_get_grad_norm"))
TOP_FRAME = STACK[:1]


def test_a_rank_in_a_plain_function_waits_only_inside_a_step(make_trainer):
    """NCCL collectives return at once, so a hang is seen where the host reads a number of the device."""
    watch = HangWatchdog(10)
    assert watch._waiting_state(False, STACK) is None
    assert watch._waiting_state(True, STACK) is not None
    watch._record_event("step 1")
    before = watch._waiting_state(False, STACK)
    assert before is not None
    assert watch._waiting_state(False, STACK) == before
    assert watch._waiting_state(False, TOP_FRAME) != before  # compilation and generation change the stack
    watch._record_event("step 1")  # a micro-batch ended
    assert watch._waiting_state(False, STACK) != before


class Phases(TrainerCallback):
    """Records the phase of the watchdog at each point of a training; it is called after the watchdog."""

    def __init__(self, watch):
        self.watch, self.seen = watch, []

    def record(self, place):
        self.seen.append((place, self.watch._phase))

    def on_step_begin(self, args, state, control, **kwargs):
        self.record("begin")

    def on_substep_end(self, args, state, control, **kwargs):
        self.record("substep")

    def on_step_end(self, args, state, control, **kwargs):
        self.record("end")

    def on_save(self, args, state, control, **kwargs):
        self.record("save")

    def on_log(self, args, state, control, **kwargs):
        self.record("log")

    def on_prediction_step(self, args, state, control, **kwargs):
        self.record("prediction")

    def on_evaluate(self, args, state, control, **kwargs):
        self.record("evaluate")


def test_steps_and_evaluations_are_watched_and_checkpoints_metrics_and_data_are_not(make_trainer, monkeypatch):
    watch = HangWatchdog(10)
    phases = Phases(watch)
    trainer = make_trainer(
        max_steps=2, gradient_accumulation_steps=2, logging_steps=1, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, per_device_eval_batch_size=2, eval_dataset=rows("llama", 6),
        callbacks=[watch, phases],
    )  # fmt: skip
    for name, owner in (("loss", "compute_loss"), ("folder", "_save_checkpoint"), ("batch", "get_batch_samples")):
        original = getattr(trainer, owner)
        monkeypatch.setattr(
            trainer, owner, lambda *a, _f=original, _n=name, **k: (phases.record(_n), _f(*a, **k))[1]
        )  # fmt: skip
    trainer.train()
    step = [("batch", ""), ("begin", "step {0}"), ("loss", "step {0}"), ("substep", "step {0}"), ("loss", "step {0}"),
            ("end", ""), ("log", ""), ("loss", ""), ("prediction", "the evaluation after step {0}"),
            ("loss", "the evaluation after step {0}"), ("prediction", "the evaluation after step {0}"),
            ("loss", "the evaluation after step {0}"), ("prediction", ""), ("log", ""), ("evaluate", ""),
            ("folder", ""), ("save", "")]  # fmt: skip
    expected = [(place, phase.format(number)) for number in (1, 2) for place, phase in step]
    assert phases.seen[: len(expected)] == expected
    assert watch._phase == ""


class Heartbeats:
    """The event that ends a watch, after a number of heartbeats."""

    def __init__(self, number):
        self.left = number

    def wait(self, seconds):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize(
    ("phase", "stacks", "code"),
    [
        ("step 3", [STACK], 1),  # the wait for NCCL
        ("the evaluation after step 3", [STACK], 1),
        ("", [STACK], None),  # a checkpoint that is written slowly
        ("step 1", [STACK, TOP_FRAME], None),  # the compilation of the first step
    ],
)
def test_an_alarm_is_raised_only_in_a_step_that_does_not_go_on(monkeypatch, phase, stacks, code):
    """Each heartbeat is a minute here."""
    minutes, seen = count(0, 60), cycle(stacks)
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: next(minutes)))
    monkeypatch.setattr(watchdog, "_stack_location", lambda thread: (False, "nonfinite.py:76", next(seen)))
    monkeypatch.setattr(watchdog.os, "_exit", sys.exit)
    watch = HangWatchdog(1800)
    watch._over, watch._main = Heartbeats(100), 0
    for name in ("_send_stack_if_requested", "_exit_if_another_rank_failed", "_describe_stacks"):
        monkeypatch.setattr(watch, name, lambda: "")
    for name in ("_send_heartbeat", "_describe_hang"):
        monkeypatch.setattr(watch, name, lambda *_: "")
    watch._record_event(phase)
    if code is None:
        watch._run()
        assert watch._over.left < 0
    else:
        with pytest.raises(SystemExit) as caught:
            watch._run()
        assert caught.value.code == code
