"""Two processes without a launcher: none that would end one of them for the other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def both_of_two(script: Path, *words: str) -> list[tuple[int, str]]:
    """How each of two ranks ended, and what it wrote to stderr; none is ended for the other."""
    processes = _start_two(script, *words)
    try:
        messages = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        _end(processes)
    return [(process.returncode, message) for process, message in zip(processes, messages, strict=True)]


def one_of_two(rank: int, script: Path, *words: str) -> tuple[int, str]:
    """How one of two ranks ended, and what it wrote to stderr; the other one is ended then."""
    processes = _start_two(script, *words)
    try:
        message = processes[rank].communicate(timeout=120)[1]
    finally:
        _end(processes)
    return processes[rank].returncode, message


def _start_two(script: Path, *words: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch = [sys.executable, str(script), *words]
    return [
        subprocess.Popen(launch, env=common | {"RANK": number, "LOCAL_RANK": number}, stderr=subprocess.PIPE, text=True)
        for number in "01"
    ]


def _end(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()
