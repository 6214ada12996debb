"""Shared by the benchmarks: fresh processes, peak resident memory, and results with versions and machine."""

import ctypes
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

RESULTS = Path(__file__).parent / "results"
_PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "liger-kernel",
    "deepspeed",
    "bitsandbytes",
    "torchao",
    "peft",
    "triton",
    "hf-distill",
)


def status_mib(field: str) -> float:
    """Return a field of the memory status of this process, such as VmRSS or RssAnon, in MiB."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) / 1024


def peak_and_seconds(call: Callable[[], object]) -> dict[str, float]:
    """Measure the seconds of a call, and its peak of resident memory above that before the call, in MiB."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_mib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "peak_mib": status_mib("VmHWM") - before}


def interleaved(script: str, cases: Iterable[dict], rounds: int) -> list[dict]:
    """Run each case once per round in a fresh process; return the medians of the JSON that the processes print."""
    cases = list(cases)
    results: list[list[dict]] = [[] for _ in cases]
    for number in range(rounds):
        for i, case in enumerate(cases):
            done = subprocess.run([sys.executable, script, json.dumps(case)], capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{case}\n{done.stderr[-3000:]}")
            results[i].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"round {number + 1}", case, results[i][-1], flush=True)
    return [
        {**case, **{key: median(run[key] for run in runs) for key in runs[0]}, "runs": runs}
        for case, runs in zip(cases, results, strict=True)
    ]


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that results depend on; None for those that are not installed."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


def save(name: str, results: dict) -> None:
    """Write `results/NAME.json` with the versions of packages and the machine."""
    import torch

    cpu = next(x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name"))
    machine = {
        "cpu": cpu.partition(":")[2].strip(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(
        json.dumps({"versions": package_versions(), "machine": machine, **results}, indent=1) + "\n"
    )
