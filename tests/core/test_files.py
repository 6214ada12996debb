"""Atomic writes leave the old or the new content, and nothing else."""

from pathlib import Path

import pytest

import hf_distill
from hf_distill.core import files
from hf_distill.core.files import atomic_path, check_writable, write_atomic
from hf_distill.errors import DistillError

ROOT = Path(hf_distill.__file__).parent


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path):
    write_atomic(tmp_path / "a.txt", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomic(tmp_path / "a.txt", "ne\ud800")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old"}


def test_a_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(files, "flush", lambda path: flushed.append((path.read_text(), (tmp_path / "a.txt").exists())))
    write_atomic(tmp_path / "a.txt", "new")
    assert flushed == [("new", False)]


def _fail(folder):
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    raise RuntimeError


def test_a_failed_write_of_a_folder_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "folder") as temporary:
        _fail(temporary)
    assert not [*tmp_path.iterdir()]
    with atomic_path(tmp_path / "folder") as temporary:
        temporary.mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_files_are_replaced_and_flushed_in_one_module():
    calls = ("os.replace(", "os.rename(", "os.fsync(", ".mkstemp(", ".mkdtemp(")
    found = {
        path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py") if any(c in path.read_text() for c in calls)
    }
    assert found <= {"core/files.py", "cache/unfinished.py"}  # the latter lists and removes temporary files


def test_a_folder_that_cannot_be_written_to_is_refused_and_one_that_can_is_not_created(tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below", "/proc/none"):
        with pytest.raises(DistillError, match="cannot be written to"):
            check_writable(tmp_path / name)
    check_writable(tmp_path / "new" / "folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
