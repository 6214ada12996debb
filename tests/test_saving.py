"""A full disk costs the checkpoint that did not fit, and no other."""

import errno
import subprocess
import sys

import pytest

from hf_distill.checkpoints import newest_whole
from hf_distill.saving import _for_want_of_room

RUN = ["run", "quickstart", "--smoke", "control=null", "train.output_dir=run"]
RUN += ["train.max_steps=12", "train.save_steps=1"]


def program(folder, *words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "hf_distill", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture
def small(tmp_path):
    """A disk of 6 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_told_and_earlier_checkpoints_stay_whole(small):
    full = program(small, *RUN, "train.save_total_limit=null")
    assert full.returncode == 1
    assert "could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    newest = newest_whole(small / "run")
    assert newest
    assert newest.name in full.stderr
    assert all((path / "trainer_state.json").is_file() for path in (small / "run").glob("checkpoint-*"))
    for path in sorted((small / "run").glob("checkpoint-*"))[:-1]:
        subprocess.run(["rm", "-r", str(path)], check=True)
    resumed = program(small, *RUN, "train.save_total_limit=1", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert f"from step {newest.name.rpartition('-')[2]} " in resumed.stdout


@pytest.mark.parametrize(
    ("error", "free", "written", "full"),
    [
        (OSError(errno.ENOSPC, "x"), 1 << 40, 0, True),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 1 << 40, 0, True),
        (RuntimeError("unexpected pos"), 5_000_000, 9_000_000, True),
        (RuntimeError("unexpected pos"), 1 << 40, 9_000_000, False),
        (PermissionError(errno.EACCES, "x"), 1 << 40, 0, False),
    ],
)
def test_other_errors_are_not_taken_for_a_full_disk(error, free, written, full):
    assert _for_want_of_room(error, free, written) == full
