"""Only one process at a time writes to a folder."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from hf_distill.core.locks import LOCK_FILE, check_unlocked, lock_folder, temporary_folder
from hf_distill.errors import DistillError

HOLD = """
import os, sys, time
from pathlib import Path
from hf_distill.core.locks import lock_folder
with lock_folder(Path(sys.argv[1]), "a run"):
    if os.fork() == 0:  # like a worker of a data loader
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_refused_and_a_killed_process_releases_the_lock_although_a_worker_lives(tmp_path):
    folder = tmp_path / "out"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    try:
        message = f"a run, process {holder.pid} on .*, since 20"
        with pytest.raises(DistillError, match=message), lock_folder(folder, "a run"):
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with lock_folder(folder, "cache write"):
            assert f"cache write, process {os.getpid()}" in (folder / LOCK_FILE).read_text()
    finally:
        holder.kill()
        os.kill(worker, signal.SIGKILL)


def test_the_temporary_folder_of_a_killed_process_is_removed_and_no_other_one(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("served-killed", "served-starting", "other-killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / LOCK_FILE).touch()
        (tmp_path / name / "head.safetensors").touch()
    (tmp_path / "served-of-a-user").mkdir()
    with temporary_folder("served-") as running:
        for folder in (running, tmp_path / "served-killed", tmp_path / "other-killed"):
            os.utime(folder / LOCK_FILE, (0, 0))
        with temporary_folder("served-"):
            kept = {"served-starting", "served-of-a-user", "other-killed", running.name}
            assert kept < {path.name for path in tmp_path.iterdir()}
            assert not (tmp_path / "served-killed").exists()
    assert not running.exists()


def test_the_lock_is_released_after_an_error_and_cannot_be_acquired_twice(tmp_path):
    def fails():
        with lock_folder(tmp_path, "a run"):
            with pytest.raises(DistillError, match="at the moment: a run, process"):
                lock_folder(tmp_path, "a run").__enter__()
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            fails()


def test_checking_a_lock_does_not_change_the_folder(tmp_path):
    check_unlocked(tmp_path)
    assert not [*tmp_path.iterdir()]
    with lock_folder(tmp_path, "a run"), pytest.raises(DistillError, match=r"Another process writes to .*: a run"):
        check_unlocked(tmp_path)
    before = (tmp_path / LOCK_FILE).read_bytes()
    check_unlocked(tmp_path)
    assert (tmp_path / LOCK_FILE).read_bytes() == before


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DistillError, match="cannot be written to"), lock_folder(tmp_path / "file" / "x", "a run"):
        pass


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch):
    def unsupported(*args, **kwargs):
        raise NotImplementedError

    warned = []
    monkeypatch.setattr("hf_distill.core.locks.FileLock.acquire", unsupported)
    monkeypatch.setattr("hf_distill.core.locks.logger.warning", warned.append)
    with lock_folder(tmp_path, "a run"):
        pass
    assert "no file locks" in warned[0]
