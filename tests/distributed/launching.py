"""Starts two processes without a launcher, which would end one of them when the other fails."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def run_both_ranks(script: Path, *arguments: str) -> list[tuple[int, str]]:
    """Run a script on two ranks; return the exit code and the stderr of each."""
    processes = _start_two(script, *arguments)
    try:
        messages = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        _kill_all(processes)
    return [(process.returncode, message) for process, message in zip(processes, messages, strict=True)]


def run_one_rank(rank: int, script: Path, *arguments: str) -> tuple[int, str]:
    """Run a script on two ranks; return the exit code and the stderr of one, and kill the other when it ends."""
    processes = _start_two(script, *arguments)
    try:
        message = processes[rank].communicate(timeout=120)[1]
    finally:
        _kill_all(processes)
    return processes[rank].returncode, message


def _start_two(script: Path, *arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch = [sys.executable, str(script), *arguments]
    return [
        subprocess.Popen(launch, env=common | {"RANK": number, "LOCAL_RANK": number}, stderr=subprocess.PIPE, text=True)
        for number in "01"
    ]


def _kill_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()
