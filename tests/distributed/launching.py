"""Two processes without a launcher: none that would end one of them for the other."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}


def one_of_two(rank: int, script: Path, *words: str) -> tuple[int, str]:
    """How one of two ranks ended, and what it wrote to stderr; the other one is ended then."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch = [sys.executable, str(script), *words]
    processes = [
        subprocess.Popen(launch, env=common | {"RANK": number, "LOCAL_RANK": number}, stderr=subprocess.PIPE, text=True)
        for number in "01"
    ]
    try:
        message = processes[rank].communicate(timeout=120)[1]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            process.stderr.close()
    return processes[rank].returncode, message
