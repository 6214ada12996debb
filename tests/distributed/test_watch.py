"""Processes that wait for a dead or hanging process end and report which one it is."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from launching import ENVIRONMENT, TORCHRUN, run_one_rank

from hf_distill.trainer.checkpoints import latest_complete

SCRIPT = str(Path(__file__).with_name("watched.py"))


@pytest.mark.parametrize(
    ("fault", "pattern"),
    [
        ("die", r"Rank 1 has ended \(last seen at .*\. The others cannot go on without it"),
        (
            "hang",
            r"Rank 0 has waited for \d+ s at .* \(step 3\): rank 1 is at distributed/watched\.py:\d+ in on_step_begin",
        ),
        ("stop", r"Rank 0 has waited for \d+ s at .* \(step 3\): rank 1 sends no heartbeat \(last seen at "),
        (
            "nccl",  # the host of rank 0 does not wait in torch.distributed
            r"Rank 0 has waited for \d+ s at distributed/watched\.py:\d+ in read_a_number \(step 3\): rank 1 is at "
            r"distributed/watched\.py:\d+ in on_step_begin\.[\s\S]*"
            r"Stack of rank 0:[\s\S]*in read_a_number[\s\S]*Stack of rank 1:[\s\S]*in on_step_begin",
        ),
    ],
)
def test_a_dead_or_hanging_rank_is_reported_and_the_other_rank_ends(tmp_path, fault, pattern):
    """There is no launcher that would kill the other process."""
    code, message = run_one_rank(0, SCRIPT, str(tmp_path / "run"), fault)
    assert code == 1
    assert re.search(pattern, message), message[-3000:]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (
            "fail",
            r"Rank 0 failed: KeyError: 'a fault of rank 0'\. Rank 1 cannot go on without it",
        ),
        ("unwritable", r"Error: Rank 0 failed with OSError: \[Errno 5\] an input/output error"),
    ],
)
def test_an_exception_on_rank_0_is_reported_on_the_other_ranks(tmp_path, fault, message):
    code, errors = run_one_rank(1, SCRIPT, str(tmp_path / "run"), fault)
    assert code == 1
    assert re.search(message, errors), errors[-3000:]


def test_both_ranks_stop_with_a_complete_checkpoint_on_sigterm_of_the_launcher(tmp_path):
    folder = tmp_path / "run"
    launch = [*TORCHRUN, SCRIPT, str(folder), "term"]
    process = subprocess.Popen(launch, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 120
        while not ((folder / "metrics.jsonl").is_file() and '"loss"' in (folder / "metrics.jsonl").read_text()):
            assert time.monotonic() < end
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    checkpoint = latest_complete(folder)
    assert checkpoint
    assert (checkpoint / "rng_state_1.pth").is_file()
    assert not (folder / "student").exists()
