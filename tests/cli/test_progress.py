"""Progress without a terminal is a line every 30 seconds; warnings of other packages are silenced."""

from io import StringIO
from types import SimpleNamespace

import pytest
from rich.console import Console

from hf_distill.cli.progress import RichProgress


def progress_lines(seconds_per_step, steps, start=0, evaluations=0, terminal=False):
    """Return the lines that a training prints, with a simulated clock."""
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
    lines = progress_lines(seconds_per_step=10, steps=100)
    assert len(lines) == 1000 // 30
    assert lines[0] == "· training: step 3 of 100 · loss 2.500 · soft 1.250 · 0:16:10 left"
    assert lines[-1].endswith("step 99 of 100 · loss 2.500 · soft 1.250 · 0:00:10 left")


def test_the_remaining_time_of_a_resumed_training_counts_only_steps_since_the_resume():
    assert progress_lines(seconds_per_step=30, steps=100, start=90)[0].startswith(
        "· training: step 91 of 100 · 0:04:30 left"
    )


def test_evaluations_do_not_suppress_lines():
    lines = progress_lines(seconds_per_step=20, steps=10, evaluations=2)
    assert any(line.startswith("· training: step") for line in lines)
    assert any(line.startswith("· evaluating: batch 1 of 2") for line in lines)


def test_a_short_training_and_a_terminal_get_no_lines():
    assert progress_lines(seconds_per_step=1, steps=20) == []
    assert not any("left" in line for line in progress_lines(seconds_per_step=40, steps=3, terminal=True))


@pytest.mark.parametrize("position", ["before", "after"])
def test_warnings_of_other_packages_are_silenced_unless_verbose_is_passed(position, monkeypatch, capsys):
    import logging
    import sys
    import warnings

    from typer.main import get_command

    from hf_distill.cli import app
    from hf_distill.cli.quiet import _LOGGERS, add_verbose, silence_other_packages

    def shown_warnings():
        loggers = [name for name in _LOGGERS if logging.getLogger(name).isEnabledFor(logging.WARNING)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.warn_explicit("old", FutureWarning, "x.py", 1, module="transformers.x")
            warnings.warn_explicit("from the user", FutureWarning, "x.py", 1, module="my_script")
        return loggers, [str(w.message) for w in caught]

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        try:
            silence_other_packages()
            assert shown_warnings() == ([], ["from the user"])
            arguments = ["--verbose", "recipes", "list"] if position == "before" else ["recipes", "list", "--verbose"]
            monkeypatch.setattr(sys, "argv", ["hf-distill", *arguments])
            add_verbose(get_command(app))(standalone_mode=False)
            assert "quickstart" in capsys.readouterr().out
            assert shown_warnings() == ([*_LOGGERS], ["old", "from the user"])
        finally:
            for name in _LOGGERS:
                logging.getLogger(name).setLevel(logging.NOTSET)
