"""Kills a teacher server, or the run that trains with it, at a chosen time, and compares the results.

The servers are processes: vLLM's protocol as `servers.teacher_servers` implements it, and `hf-distill serve`.
"""

import json
import os
import signal
import socket
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from crashing import KillPoint, differences, kill_and_resume, run_child, run_in_process, run_outputs
from forking import fork_context, start_python

APIS = ("vllm", "hidden")
_TEACHER, _TOP_K = "smoke:llama/teacher", 8
_ENDS = "ends"  # file of a run's working directory, with a line for each process that reached the end
_START_SECONDS, _RUN_SECONDS = 60.0, 120.0


class ServerProcess:
    """A teacher server in a separate process, on a port that stays the same after a restart."""

    def __init__(self, api: str, folder: Path):
        self.api, self.folder = api, folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._process: BaseProcess | None = None

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        self.folder.mkdir(exist_ok=True)
        if self.api == "vllm":
            self._process = fork_context().Process(target=_serve_vllm, args=(self.port, self.folder / "log"))
            self._process.start()
        else:
            command = ["-m", "hf_distill", "serve", _teacher_folder(), "--port", str(self.port)]
            log = self.folder / "log"
            self._process = start_python(command, self.folder, log, log)
        path, limit = "/health" if self.api == "hidden" else "/v1/models", time.monotonic() + _START_SECONDS
        while not _answers(self.url + path):
            if not self._process.is_alive() or time.monotonic() > limit:
                raise RuntimeError(f"the server did not start: {(self.folder / 'log').read_text()[-1500:]}")
            time.sleep(0.02)

    def kill(self) -> None:
        """End the server with SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.join()


@contextmanager
def running_server(api: str, folder: Path) -> Iterator[ServerProcess]:
    """Start a server, and kill it at the end."""
    server = ServerProcess(api, folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def _teacher_folder() -> str:
    from hf_distill.runner.model_loading import resolve_model

    return str(resolve_model(_TEACHER))


def _serve_vllm(port: int, log: Path) -> None:
    import torch
    from servers.teacher_servers import VLLMServer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    folder = _teacher_folder()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    with VLLMServer(model, tokenizer=tokenizer, context=512, port=port):
        signal.pause()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


def make_workload(server: ServerProcess) -> Callable[[], None]:
    """Return a function that runs or resumes a recipe with the server as teacher, in the folder `run`.

    One request is in flight at a time, so that `hf-distill serve` always computes the same rows in one forward: its
    hidden states are then equal bit for bit.
    """
    return partial(_train, server.api, server.url)


def _train(api: str, url: str) -> None:
    from hf_distill.recipe import load_recipe, run_recipe

    teacher = {"kind": "remote", "api": api, "url": url, "concurrency": 1, "retry_seconds": 60}
    if api != "hidden":
        teacher["top_k"] = _TOP_K
    train = {"output_dir": "run", "max_steps": 12, "save_steps": 3, "logging_steps": 1, "eval_steps": 4}
    train |= {"eval_strategy": "steps", "per_device_train_batch_size": 4, "learning_rate": 0.01, "use_cpu": True}
    recipe = {
        "student": {"model": "smoke:llama/student"},
        "teacher": teacher,
        "data": {"task": {"path": "package:builtins"}, "eval": {"holdout": 0.1, "max_rows": 4}, "max_length": 64},
        "distill": {"temperature": 1.0, "alpha": 0.5},
        "train": train | {"save_total_limit": 1, "gradient_accumulation_steps": 2},
    }
    Path("remote.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    run_recipe(load_recipe("remote.yaml"), resume=True)
    with Path(_ENDS).open("a") as file:
        file.write("end\n")


def run_undisturbed(server: ServerProcess, folder: Path) -> tuple[dict[str, Any], float]:
    """Run the workload; return its outputs and the seconds that it took."""
    start = time.monotonic()
    if code := run_in_process(make_workload(server), folder):
        raise RuntimeError(f"the run ended with {code}: {(folder / 'log').read_text()[-3000:]}")
    return run_outputs(folder, "remote"), time.monotonic() - start


def kill_client(server: ServerProcess, folder: Path, seconds: float, expected: dict[str, Any]) -> str | None:
    """Kill the run after some seconds and resume it; return what differs, None if nothing does."""
    return kill_and_resume(make_workload(server), folder, KillPoint(seconds=seconds), expected, "remote")


def kill_server(server: ServerProcess, folder: Path, seconds: float, expected: dict[str, Any]) -> str | None:
    """Kill the server some seconds after a run began, and start it again; return what differs, None if nothing does."""
    process = fork_context().Process(target=run_child, args=(make_workload(server), folder))
    process.start()
    process.join(seconds)
    server.kill()
    server.start()
    process.join(_RUN_SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    what = f"server killed after {seconds:.2f} s"
    if process.exitcode:
        return f"{what}: ended with {process.exitcode}: {(folder / 'log').read_text()[-1500:]}"
    differing = differences(run_outputs(folder, "remote"), expected)
    return f"{what}: not the same: {', '.join(differing)}" if differing else None


def was_killed(folder: Path) -> bool:
    """Whether the first process of `kill_client` was killed before its end, so that only the second one reached it."""
    return (folder / _ENDS).read_text().count("end") == 1


def count_retries(folder: Path) -> int:
    """Return the number of failed requests that the log of a run reports."""
    return (folder / "log").read_text().count("The teacher server")
