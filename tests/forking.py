"""Starts processes by forking one that has imported the libraries, because imports take longer than most tests."""

import atexit
import gc
import multiprocessing
import os
import runpy
import socket
import sys
import traceback
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
_PRELOAD = [  # modules that the processes of tests import
    *("hf_distill.runner.run", "hf_distill.runner.cache_writer", "hf_distill.trl", "hf_distill.cache.api"),
    *("transformers.models.llama.modeling_llama", "transformers.trainer", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "datasets", "peft", "trl.experimental.gkd", "deepspeed"),
    *("hf_distill.cli", "transformers.distributed", "torch.distributed.fsdp", "pytest"),
]


@cache
def fork_context() -> ForkServerContext:
    """Return the context whose processes are forked from one that has imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    with mock.patch.dict(os.environ, ENVIRONMENT):
        forkserver.ensure_running()
    return context


def environments_of_ranks(number: int) -> list[dict[str, str]]:
    """Return what a launcher sets in the environment of each rank; nothing for a single process."""
    if number == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    world = address | {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    return [world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(number)]


def start_python(
    arguments: Sequence[str],
    folder: Path,
    output: Path,
    errors: Path,
    environment: Mapping[str, str] = {},
) -> BaseProcess:
    """Start a process that does what `python ARGUMENTS` does in a folder, but does not finalize its interpreter.

    The finalization takes longer than most tests, and gloo can abort it: a thread of the process group that frees the
    tensors of the last collective waits for the interpreter that ends.

    Args:
        arguments: a script or `-m` and a module, and its arguments.
        folder: the working directory.
        output: the file for stdout.
        errors: the file for stderr.
        environment: changes of the environment.
    """
    process = fork_context().Process(target=_run_python, args=(arguments, folder, output, errors, dict(environment)))
    process.start()
    return process


def _run_python(
    arguments: Sequence[str], folder: Path, output: Path, errors: Path, environment: dict[str, str]
) -> None:
    import torch

    gc.freeze()  # garbage collection would walk every imported module
    torch.set_num_threads(1)
    for file, number in ((output, 1), (errors, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(folder)
    os.environ.update(environment)
    code = _run_arguments(arguments)
    atexit._run_exitfuncs()
    sys.exit(code)  # multiprocessing joins the threads and ends the process


def _run_arguments(arguments: Sequence[str]) -> int:
    """Run a script or module and return the exit code of Python."""
    try:
        if arguments[0] == "-m":
            sys.argv, sys.path[0] = list(arguments[1:]), os.getcwd()
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = list(arguments), str(Path(arguments[0]).parent)
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
