"""Run what is missing of the cross-tokenizer experiments, and write ../results/cross_tokenizer.json.

    python run.py [RUN ...]     with names such as hard-0 or live-alignment, only these runs

Each run is a process, and leaves a file in the folder of work; what is there is not run again. Runs named ARM-SEED
measure quality: the teacher's hidden states are computed once for all of them. Runs named live-ARM-ROUND measure time
and memory of steps in which the teacher runs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

from models import TEACHERS, WORK

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import save

HERE = Path(__file__).resolve().parent
RESULTS = WORK / "results"
SEEDS = {"hard": 3, "qwen_projected_kl": 3}  # of other arms the first only
LIVE_STEPS, ROUNDS = 6, 3
LIVE = ("hard", "smollm2", "equal_alm", "equal_projected_kl", "equal_uld", "qwen_alm", "qwen_projected_kl", "gold")
# What a step frees is kept for the next one, which would otherwise ask the system for it anew.
_KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 33),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def before() -> dict[str, dict[str, float]]:
    """Return the bits per byte of the teachers, and of the student at the start."""
    from bits_per_byte import held_out_bits
    from train import held_out, load, student_path
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start = student_path()
    texts = held_out()
    student = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    bits = {"student at the start": held_out_bits(*student, texts)}
    for name in ("smollm2", *TEACHERS):
        bits[name] = held_out_bits(*load(name), texts)
    return bits


def all_runs() -> list[str]:
    """Return the names of all runs: quality by seed, then time and memory, in which the arms take turns."""
    from train import ARMS

    arms = [arm for arm in ARMS if not arm.startswith("equal")]
    quality = [f"{arm}-{seed}" for seed in range(3) for arm in arms if seed < SEEDS.get(arm, 1)]
    return ["before", *quality, "alignment", *(f"live-{arm}-{number}" for number in range(ROUNDS) for arm in LIVE)]


def run(name: str) -> dict[str, Any]:
    """Return what a run prints as JSON; it is run unless an earlier one has left its result."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        arm, _, number = name.removeprefix("live-").rpartition("-")
        live = [str(LIVE_STEPS)] if name.startswith("live-") else []
        script = {"before": ["run.py", "--before"], "alignment": ["alignment.py"]}
        command = [sys.executable, *script.get(name, ["train.py", arm, number, *live])]
        done = subprocess.run(command, cwd=HERE, env=os.environ | _KEEP_MEMORY, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}:\n{done.stderr[-4000:]}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout.strip().splitlines()[-1])
        print(name, file.read_text(), flush=True)
    return json.loads(file.read_text())


def summary() -> dict[str, Any]:
    """Return the results of the runs that were made."""
    runs = {name: run(name) for name in all_runs() if (RESULTS / f"{name}.json").is_file()}
    live = {}
    for arm in LIVE:
        rounds = [figures for name, figures in runs.items() if name.startswith(f"live-{arm}-")]
        if rounds:
            keys = rounds[0].keys() - {"arm", "seed", "steps"}
            live[arm] = {key: median(each[key] for each in rounds) for key in keys} | {"rounds": len(rounds)}
    quality = {name: runs[name] for name in runs if not name.startswith(("live-", "before", "alignment"))}
    return {"before": runs.get("before"), "quality": quality, "live": live, **runs.get("alignment", {})}


if __name__ == "__main__":
    if sys.argv[1:] == ["--before"]:
        print(json.dumps(before()))
    else:
        for each in sys.argv[1:] or all_runs():
            run(each)
        save("cross_tokenizer", summary())
