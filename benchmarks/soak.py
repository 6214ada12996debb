"""Nothing lost, in full: runs of every kind killed at 30 moments, memory over 500 steps, what the self-check costs.

python soak.py              (`make soak`)
python soak.py crashes      the kills alone; the other results stay as they are
"""

import json
import multiprocessing
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from crashing import KINDS, Fate, content, fates, make_workload, started, trial
from measure import status_mib
from transformers import TrainerCallback

from hf_distill.core.io import environment, write_json

RESULT = Path(__file__).parent / "results" / "soak.json"
MOMENTS, STEPS, SETTLED = 30, 500, 100
TRAINABLE_KINDS = [kind for kind in KINDS if kind not in ("chain", "capture")]


def crashes(place: Path, kind: str) -> dict[str, Any]:
    """Kill a kind's runs at so many moments; what was lost."""
    start, job = time.perf_counter(), make_workload(kind, place)
    if code := started(job, place / kind, counts=place / f"{kind}.json"):
        raise RuntimeError(f"{kind} ended with {code}: {(place / kind / 'log').read_text()[-3000:]}")
    expected = content(place / kind, kind)
    drawn = fates(json.loads((place / f"{kind}.json").read_text()), MOMENTS, seed=0)

    folders = [place / f"{kind}-{i}" for i in range(len(drawn))]
    # Not threads: multiprocessing would collect the processes of one in the other.
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        alike = (repeat(expected), repeat(kind))
        tried = pool.map(_trial, repeat(job), folders, drawn, *alike)
        lost = [found for found in tried if found]
    met = Counter(fate.place or "at a random time" for fate in drawn)
    seconds = round(time.perf_counter() - start)
    print(f"{kind}: {len(drawn)} crashes, {len(lost)} lost something ({seconds} s)", *lost, sep="\n  ", flush=True)
    return {"crashes": len(drawn), "lost": lost, "where": dict(sorted(met.items())), "seconds": seconds}


def _trial(job: Any, folder: Path, fate: Fate, expected: dict[str, Any], kind: str) -> str | None:
    lost = trial(job, folder, fate, expected, kind)
    shutil.rmtree(folder)
    return lost


class Resident(TrainerCallback):
    """Memory of this process, every ten steps."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= SETTLED and state.global_step % 10 == 0:
            self.seen.append((state.global_step, status_mib("VmRSS")))


def memory(kind: str, place: Path) -> dict[str, float]:
    """In this process: MB that a hundred steps add, with evaluation, logs and checkpoints, once the first are over."""
    resident = Resident()
    often = [f"train.max_steps={STEPS}", "train.save_steps=50", "train.eval_steps=50", "train.logging_steps=10"]
    make_workload(kind, place, "control=null", *often, callbacks=[resident])()
    steps, mib = np.array(resident.seen).T
    slope = float(np.polyfit(steps, mib, 1)[0]) * 100 * 2**20 / 1e6
    return {"mb_per_100_steps": slope, "first_mb": mib[0] * 2**20 / 1e6, "last_mb": mib[-1] * 2**20 / 1e6}


def self_check(place: Path) -> dict[str, float]:
    """In this process: its share of 20 steps of the quickstart."""
    import hf_distill.trainer.trainer
    from hf_distill.recipe import load_recipe, run_recipe
    from hf_distill.trainer.self_check import SelfCheck

    seconds = []

    class Timed(SelfCheck):
        def __call__(self, *given):
            start = time.perf_counter()
            super().__call__(*given)
            seconds.append(time.perf_counter() - start)

    hf_distill.trainer.trainer.SelfCheck = Timed
    changes = [f"train.output_dir={place / 'run'}", "train.max_steps=20", "control=null"]
    trained = run_recipe(load_recipe("quickstart", changes)).models["student"]["train_seconds"]
    (spent,) = seconds
    return {"check_s": spent, "train_s": trained, "share": spent / trained}


def apart(what: str, *words: str) -> dict[str, Any]:
    """A measurement in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(Path(__file__).resolve()), what, *words]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    found = json.loads(done.stdout.strip().splitlines()[-1])
    print(what, *words, found, flush=True)
    return found


def killed(place: Path) -> dict[str, Any]:
    """Runs of every kind, with `save_total_limit: 1`, killed and resumed."""
    if started(make_workload("capture", place), place / "cache"):
        raise RuntimeError((place / "cache" / "log").read_text()[-3000:])
    kinds = {kind: crashes(place, kind) for kind in KINDS}
    total, lost = sum(one["crashes"] for one in kinds.values()), sum(len(one["lost"]) for one in kinds.values())
    return {"crashes": total, "lost": lost, "save_total_limit": 1, "kinds": kinds}


def main() -> None:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        found = killed(place)
        grown = {kind: apart("memory", kind, folder) for kind in TRAINABLE_KINDS}
    share = apart("self_check")
    results = {
        "environment": environment("cpu"),
        "crashes": found,
        "memory": {
            "steps": STEPS,
            "most_mb_per_100_steps": max(m["mb_per_100_steps"] for m in grown.values()),
            "kinds": grown,
        },
        "self_check": share,
    }
    write_json(RESULT, results)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print(json.dumps(memory(sys.argv[2], Path(sys.argv[3]))))
    elif sys.argv[1:2] == ["self_check"]:
        print(json.dumps(self_check(Path.cwd())))
    elif sys.argv[1:2] == ["crashes"]:
        with tempfile.TemporaryDirectory() as temporary:
            results = json.loads(RESULT.read_text())
            write_json(RESULT, results | {"environment": environment("cpu"), "crashes": killed(Path(temporary))})
    else:
        main()
