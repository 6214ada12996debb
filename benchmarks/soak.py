"""Soak test: runs of every kind are killed at 30 moments and resumed; memory over 500 steps; cost of the self-check.

python soak.py              (`make soak`)
python soak.py crashes [KIND ...]   only the killed runs, of all kinds or some; the other results are kept
python soak.py memory [KIND ...]    only the memory, of all kinds or some; the other results are kept
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from crashing import (
    FILES_ALONE,
    KINDS,
    NUM_RANKS,
    KillPoint,
    draw_kill_points,
    kill_and_resume,
    make_workload,
    run_in_process,
    run_outputs,
)
from measure import status_mib
from transformers import TrainerCallback

from hf_distill.core.io import environment, write_json

RESULT = Path(__file__).parent / "results" / "soak.json"
MOMENTS, STEPS, SETTLED = 30, 500, 100
MEASURED_KINDS = [kind for kind in KINDS if kind not in ("chain", "two processes", *FILES_ALONE)]  # in one process


def kill_runs(folder: Path, kind: str) -> dict[str, Any]:
    """Kill and resume runs of a kind at several moments; return what was lost."""
    start, workload = time.perf_counter(), make_workload(kind, folder)
    if code := run_in_process(workload, folder / kind, counts=folder / f"{kind}.json", num_ranks=NUM_RANKS[kind]):
        raise RuntimeError(f"{kind} ended with {code}: {(folder / kind / 'log').read_text()[-3000:]}")
    expected = run_outputs(folder / kind, kind)
    drawn = draw_kill_points(json.loads((folder / f"{kind}.json").read_text()), MOMENTS, seed=0)

    folders = [folder / f"{kind}-{i}" for i in range(len(drawn))]
    # Processes and not threads, because multiprocessing would join the child processes of another thread.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        alike = (repeat(expected), repeat(kind))
        messages = pool.map(_trial, repeat(workload), folders, drawn, *alike)
        lost = [message for message in messages if message]
    moments = Counter(kill_point.location or "at a random time" for kill_point in drawn)
    seconds = round(time.perf_counter() - start)
    print(f"{kind}: {len(drawn)} crashes, {len(lost)} lost something ({seconds} s)", *lost, sep="\n  ", flush=True)
    return {"crashes": len(drawn), "lost": lost, "where": dict(sorted(moments.items())), "seconds": seconds}


def _trial(workload: Any, folder: Path, kill_point: KillPoint, expected: dict[str, Any], kind: str) -> str | None:
    lost = kill_and_resume(workload, folder, kill_point, expected, kind)
    shutil.rmtree(folder)
    return lost


class ResidentMemory(TrainerCallback):
    """Records the resident memory of this process every ten steps."""

    def __init__(self) -> None:
        self.samples: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= SETTLED and state.global_step % 10 == 0:
            self.samples.append((state.global_step, status_mib("VmRSS")))


def memory(kind: str, folder: Path) -> dict[str, float]:
    """Measure the MB that 100 steps add, with evaluation, logs and checkpoints, after the first 100 steps."""
    resident = ResidentMemory()
    often = [f"train.max_steps={STEPS}", "train.save_steps=50", "train.eval_steps=50", "train.logging_steps=10"]
    make_workload(kind, folder, "control=null", *often, callbacks=[resident])()
    steps, mib = np.array(resident.samples).T
    slope = float(np.polyfit(steps, mib, 1)[0]) * 100 * 2**20 / 1e6
    return {"mb_per_100_steps": slope, "first_mb": mib[0] * 2**20 / 1e6, "last_mb": mib[-1] * 2**20 / 1e6}


def self_check(folder: Path) -> dict[str, float]:
    """Measure the share of the self-check in 20 steps of the quickstart."""
    import hf_distill.trainer.trainer
    from hf_distill.recipe import load_recipe, run_recipe
    from hf_distill.trainer.self_check import SelfCheck

    seconds = []

    class Timed(SelfCheck):
        def __call__(self, *arguments):
            start = time.perf_counter()
            super().__call__(*arguments)
            seconds.append(time.perf_counter() - start)

    hf_distill.trainer.trainer.SelfCheck = Timed
    changes = [f"train.output_dir={folder / 'run'}", "train.max_steps=20", "control=null"]
    trained = run_recipe(load_recipe("quickstart", changes)).models["student"]["train_seconds"]
    (check_seconds,) = seconds
    return {"check_s": check_seconds, "train_s": trained, "share": check_seconds / trained}


def run_in_fresh_process(part: str, *arguments: str) -> dict[str, Any]:
    """Run a measurement in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), part, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    results = json.loads(done.stdout.strip().splitlines()[-1])
    print(part, *arguments, results, flush=True)
    return results


def write_cache(folder: Path) -> None:
    """Write the teacher cache of the kind `cached`."""
    if run_in_process(make_workload("capture", folder), folder / "cache"):
        raise RuntimeError((folder / "cache" / "log").read_text()[-3000:])


def kill_kinds(folder: Path, names: Sequence[str], earlier: dict[str, Any]) -> dict[str, Any]:
    """Kill and resume runs of some kinds, with `save_total_limit: 1`; add the results of earlier calls for others."""
    kinds = earlier | {kind: kill_runs(folder, kind) for kind in names}
    total, lost = sum(one["crashes"] for one in kinds.values()), sum(len(one["lost"]) for one in kinds.values())
    return {"crashes": total, "lost": lost, "save_total_limit": 1, "kinds": kinds}


def memory_of_kinds(folder: Path, names: Sequence[str], earlier: dict[str, Any]) -> dict[str, Any]:
    """Measure the growth of memory of some kinds, one after another in fresh processes; add earlier results."""
    growth = earlier | {kind: run_in_fresh_process("memory_of_kind", kind, str(folder)) for kind in names}
    most = max(kind["mb_per_100_steps"] for kind in growth.values())
    return {"steps": STEPS, "most_mb_per_100_steps": most, "kinds": growth}


def main(parts: Sequence[str] = ("crashes", "memory", "self_check"), kinds: Sequence[str] = ()) -> None:
    """Measure some parts and write results/soak.json; results of other parts, and of other kinds, are kept."""
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_cache(folder)
        earlier = {part: results[part]["kinds"] if kinds else {} for part in ("crashes", "memory")}
        if "crashes" in parts:
            results["crashes"] = kill_kinds(folder, kinds or [*KINDS], earlier["crashes"])
        if "memory" in parts:
            results["memory"] = memory_of_kinds(folder, kinds or MEASURED_KINDS, earlier["memory"])
    if "self_check" in parts:
        results["self_check"] = run_in_fresh_process("self_check")
    write_json(RESULT, results | {"environment": environment("cpu")})


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["memory_of_kind", kind, shared_folder]:
            print(json.dumps(memory(kind, Path(shared_folder))))
        case ["self_check"]:
            print(json.dumps(self_check(Path.cwd())))
        case ["crashes" | "memory" as part, *names]:
            main([part], names)
        case _:
            main()
