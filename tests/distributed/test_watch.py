"""Processes that wait for one that is gone or stuck end, and say which it was."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launching import ENVIRONMENT, one_of_two

from hf_distill.trainer.checkpoints import latest_complete

SCRIPT = Path(__file__).with_name("watched.py")


@pytest.mark.parametrize(
    ("fate", "told"),
    [
        ("die", r"Rank 1 has ended \(last seen at .*\. The others cannot go on without it"),
        ("hang", r"Rank 0 has waited for \d+ s: rank 1 is at distributed/watched\.py:\d+ in on_step_begin\."),
        ("stop", r"Rank 0 has waited for \d+ s: rank 1 sends no heartbeat \(last seen at "),
    ],
)
def test_a_rank_that_is_gone_or_stuck_is_named_and_the_other_ends(tmp_path, fate, told):
    """No launcher that would kill the other."""
    code, message = one_of_two(0, SCRIPT, str(tmp_path / "run"), fate)
    assert code == 1
    assert re.search(told, message), message[-3000:]


@pytest.mark.parametrize(
    ("fate", "message"),
    [
        (
            "fail",
            r"Rank 0 failed: KeyError: 'a fault of rank 0'\. Rank 1 cannot go on without it",
        ),
        ("unwritable", r"Error: Rank 0 failed with OSError: \[Errno 5\] an input/output error"),
    ],
)
def test_an_exception_of_rank_0_reaches_the_others(tmp_path, fate, message):
    code, errors = one_of_two(1, SCRIPT, str(tmp_path / "run"), fate)
    assert code == 1
    assert re.search(message, errors), errors[-3000:]


def test_both_stop_with_a_whole_checkpoint_when_their_launcher_is_told_to(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    folder = tmp_path / "run"
    process = subprocess.Popen([*launch, str(folder), "term"], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not ((folder / "metrics.jsonl").is_file() and '"loss"' in (folder / "metrics.jsonl").read_text()):
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    checkpoint = latest_complete(folder)
    assert checkpoint
    assert (checkpoint / "rng_state_1.pth").is_file()
    assert not (folder / "student").exists()
