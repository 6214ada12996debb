"""Lock files: one process at a time writes to a folder. The system releases a lock when its process ends."""

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ..errors import DistillError

LOCK_FILE = ".lock"
_SECONDS_TO_LOCK = 60  # after the creation of a lock file, in which its process has locked it

logger = logging.get_logger(__name__)


@contextmanager
def lock_folder(folder: Path, purpose: str) -> Iterator[None]:
    """Hold the lock of a folder while the block runs, so that no second process writes into it.

    The folder is created if it does not exist. The lock file stays in the folder afterwards, because removing it
    would let two waiting processes lock two different files; it names the last holder and is not a sign of a running
    process. In a launch of several processes the main process alone takes the lock.

    Args:
        folder: the folder that is written to.
        purpose: what writes to it, for the message that a second process gets, such as "a run".

    Raises:
        DistillError: another process holds the lock, or the folder cannot be written to.
    """
    file = folder / LOCK_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file, on_acquired=lambda descriptor: _write_holder(descriptor, purpose))
        lock.acquire(timeout=0)
    except Timeout:
        raise _is_locked(folder) from None
    except NotImplementedError:
        logger.warning(f"The file system of {folder} has no file locks: a second process in it would not be noticed.")
        yield
        return
    except OSError as error:
        raise DistillError(f"{folder} cannot be written to ({error.strerror}): give another folder.") from error
    try:
        yield
    finally:
        lock.release()


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Yield a temporary folder, which is removed at the end.

    A process that is killed leaves its folder. The next call with the same prefix removes it: the system has released
    the lock of a folder whose process has ended.

    Args:
        prefix: the beginning of the folder's name.
    """
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with suppress(NotImplementedError, OSError, Timeout):  # of another user, without locks, or in use
            _remove_if_unused(folder)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        lock = FileLock(Path(name) / LOCK_FILE)
        with suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
        try:
            yield Path(name)
        finally:
            lock.release()


def _remove_if_unused(folder: Path) -> None:
    """Remove a temporary folder whose lock is free."""
    file = folder / LOCK_FILE
    if time.time() - file.stat().st_mtime > _SECONDS_TO_LOCK:
        with FileLock(file).acquire(timeout=0):
            shutil.rmtree(folder, ignore_errors=True)


def check_unlocked(folder: Path) -> None:
    """Check that no other process writes to a folder at the moment; the folder is not changed.

    Raises:
        DistillError: another process holds the lock.
    """
    if not (folder / LOCK_FILE).is_file():
        return
    with suppress(NotImplementedError, OSError):
        try:
            FileLock(folder / LOCK_FILE).acquire(timeout=0).lock.release()
        except Timeout:
            raise _is_locked(folder) from None


def remove_lock_file(folder: Path) -> None:
    """Remove the lock file of a folder that is about to be removed; call it while the lock is held."""
    with suppress(FileNotFoundError):
        (folder / LOCK_FILE).unlink()


def _is_locked(folder: Path) -> DistillError:
    return DistillError(
        f"Another process writes to {folder} at the moment: {_read_holder(folder / LOCK_FILE)}. Wait until it has "
        "ended, or give another folder."
    )


def _write_holder(descriptor: int, purpose: str) -> None:
    since = datetime.now().isoformat(sep=" ", timespec="seconds")
    text = f"{purpose}, process {os.getpid()} on {socket.gethostname()}, since {since}\n".encode()
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text, 0)


def _read_holder(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip() or "unknown"
    except OSError:
        return "unknown"
