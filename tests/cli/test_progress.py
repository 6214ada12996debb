"""Progress where the output is not a terminal: a line every 30 seconds."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from hf_distill.cli.progress import RichProgress


def trained(seconds_per_step, steps, start=0, evaluations=0, terminal=False):
    """What a training prints whose steps take some seconds each, by a clock of the test."""
    now, out = [0.0], StringIO()
    progress = RichProgress(Console(file=out, width=200, force_terminal=terminal), clock=lambda: now[0])
    state = SimpleNamespace(max_steps=steps, global_step=start, is_world_process_zero=True)
    with progress:
        progress.on_train_begin(None, state, None)
        while state.global_step < steps:
            now[0] += seconds_per_step
            state.global_step += 1
            progress.on_step_end(None, state, None)
            progress.on_log(None, state, None, {"loss": 2.5, "soft_loss": 1.25})
            for _ in range(evaluations):
                now[0] += seconds_per_step
                progress.on_prediction_step(None, state, None, eval_dataloader=[0] * evaluations)
            progress.on_evaluate(None, state, None)
        progress.on_train_end(None, state, None)
    return out.getvalue().splitlines()


def test_a_line_every_30_seconds_has_step_loss_and_remaining_time():
    lines = trained(seconds_per_step=10, steps=100)
    assert len(lines) == 1000 // 30
    assert lines[0] == "· training: step 3 of 100 · loss 2.500 · soft 1.250 · 0:16:10 left"
    assert lines[-1].endswith("step 99 of 100 · loss 2.500 · soft 1.250 · 0:00:10 left")


def test_the_remaining_time_of_a_resumed_training_is_that_of_its_own_steps():
    assert trained(seconds_per_step=30, steps=100, start=90)[0].startswith("· training: step 91 of 100 · 0:04:30 left")


def test_evaluations_do_not_keep_lines_back():
    lines = trained(seconds_per_step=20, steps=10, evaluations=2)
    assert any(line.startswith("· training: step") for line in lines)
    assert any(line.startswith("· evaluating: batch 1 of 2") for line in lines)


def test_a_short_training_prints_no_line_and_a_terminal_has_bars_instead():
    assert trained(seconds_per_step=1, steps=20) == []
    assert not any("left" in line for line in trained(seconds_per_step=40, steps=3, terminal=True))


@pytest.mark.parametrize("place", ["before", "after"])
def test_other_packages_are_silent_unless_verbose_is_given(place, monkeypatch, capsys):
    import logging
    import sys
    import warnings

    from typer.main import get_command

    from hf_distill.cli import app
    from hf_distill.cli.quiet import _LOGGERS, add_verbose, silence_other_packages

    def heard():
        found = [name for name in _LOGGERS if logging.getLogger(name).isEnabledFor(logging.WARNING)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn_explicit("old", FutureWarning, "x.py", 1, module="transformers.x")
            warnings.warn_explicit("of the user", FutureWarning, "x.py", 1, module="my_script")
        return found, [str(w.message) for w in caught]

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            silence_other_packages()
            assert heard() == ([], ["of the user"])
            words = ["--verbose", "recipes", "list"] if place == "before" else ["recipes", "list", "--verbose"]
            monkeypatch.setattr(sys, "argv", ["hf-distill", *words])
            add_verbose(get_command(app))(standalone_mode=False)
            assert "quickstart" in capsys.readouterr().out
            assert heard() == ([*_LOGGERS], ["old", "of the user"])
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.NOTSET)
