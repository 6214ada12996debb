"""Starts scripts on several ranks, which are forked from a process that has imported the libraries.

Each test has processes of its own, so that the state of one (process groups, DeepSpeed, accelerate) cannot change the
result of another. A few tests use the launchers of PyTorch and Accelerate instead.
"""

import os
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import forking

_CHANGES = forking.ENVIRONMENT | {"COLUMNS": "100"}
ENVIRONMENT = os.environ | _CHANGES
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
_FAULT_SECONDS = 30  # after a rank has failed, for the messages of the others
_TIMEOUT_SECONDS = 600


@dataclass(frozen=True)
class Ended:
    """What the processes of a launch left: the first exit code that is not 0, and the texts of all ranks."""

    returncode: int
    stdout: str
    stderr: str


def run_on_ranks(number: int, *arguments: str, folder: Path = Path()) -> Ended:
    """Run `python ARGUMENTS` on some ranks; when a rank fails, the others end.

    Args:
        number: the number of ranks; with 1 there is no process group.
        arguments: a script or `-m` and a module, and its arguments.
        folder: the working directory.
    """
    with _Ranks(number, arguments, folder) as ranks:
        codes = ranks.wait_for_all()
        return Ended(next((code for code in codes if code), 0), ranks.read("stdout"), ranks.read("stderr"))


def run_both_ranks(*arguments: str) -> list[tuple[int, str]]:
    """Run a script on two ranks, each to its end; return the exit code and the stderr of each."""
    with _Ranks(2, arguments) as ranks:
        return [(ranks.wait_for(rank), ranks.read("stderr", rank)) for rank in range(2)]


def run_one_rank(rank: int, *arguments: str) -> tuple[int, str]:
    """Run a script on two ranks; return the exit code and the stderr of one, and kill the other when it ends."""
    with _Ranks(2, arguments) as ranks:
        return ranks.wait_for(rank), ranks.read("stderr", rank)


class _Ranks:
    """The processes of a launch; they are killed when the block ends."""

    def __init__(self, number: int, arguments: tuple[str, ...], folder: Path = Path()):
        self._logs = tempfile.TemporaryDirectory()
        self._end = time.monotonic() + _TIMEOUT_SECONDS
        self._processes: list[BaseProcess] = [
            forking.start_python(
                arguments,
                folder.absolute(),
                *(self._log(kind, rank) for kind in ("stdout", "stderr")),
                _CHANGES | environment,
            )
            for rank, environment in enumerate(forking.environments_of_ranks(number))
        ]

    def __enter__(self) -> "_Ranks":
        return self

    def __exit__(self, *error) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._logs.cleanup()

    def _log(self, kind: str, rank: int) -> Path:
        return Path(self._logs.name, f"{kind}-{rank}")

    def read(self, kind: str, *ranks: int) -> str:
        """Return the stdout or stderr of some ranks, by default of all."""
        return "".join(self._log(kind, rank).read_text() for rank in ranks or range(len(self._processes)))

    def _seconds_left(self) -> float:
        return max(0.0, self._end - time.monotonic())

    def wait_for(self, rank: int) -> int:
        """Wait until a rank ends and return its exit code."""
        self._processes[rank].join(self._seconds_left())
        code = self._processes[rank].exitcode
        assert code is not None, f"rank {rank} does not end: {self.read('stderr', rank)[-4000:]}"
        return code

    def wait_for_all(self) -> list[int]:
        """Wait until all ranks end, at most half a minute after one has failed, and return their exit codes."""
        while running := [process for process in self._processes if process.exitcode is None]:
            failed = any(process.exitcode for process in self._processes)
            if failed:
                self._end = min(self._end, time.monotonic() + _FAULT_SECONDS)
            if not connection.wait([process.sentinel for process in running], self._seconds_left()):
                assert failed, f"the ranks do not end: {self.read('stderr')[-4000:]}"
                break
        return [process.exitcode or 0 for process in self._processes]
