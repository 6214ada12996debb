"""Kills `hf-distill generate` at 30 moments, 15 with each kind of batching, and resumes it.

python generation_kills.py

Ten moments are times, and the others calls: of the model's writer of completions, of the writer of the data set, of
renames and removals, before, in the middle of, or after them. The files of the data set must equal those of a
generation that was not killed, byte for byte.
"""

import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from crashing import draw_kill_points, kill_and_resume, make_workload, run_in_process, run_outputs

from hf_distill.core.io import environment, write_json

RESULT = Path(__file__).parent / "results" / "generation_kills.json"
KILLS = 15


def measure(batching: str, folder: Path) -> dict[str, Any]:
    """Kill generations with one kind of batching; return how many were killed, and what differed."""
    workload = make_workload("generate", folder, f"generate.batching={batching}")
    if code := run_in_process(workload, folder / "whole", counts=folder / "counts.json"):
        raise RuntimeError(f"the generation ended with {code}: {(folder / 'whole' / 'log').read_text()[-3000:]}")
    counts, expected = json.loads((folder / "counts.json").read_text()), run_outputs(folder / "whole", "generate")
    lost, points = list[str](), draw_kill_points(counts, KILLS, seed=0)
    for number, point in enumerate(points):
        if message := kill_and_resume(workload, folder / str(number), point, expected, "generate"):
            lost.append(message)
        print(batching, point, message or "the same", flush=True)
    facts = {"files": len(expected), "bytes": sum(map(len, expected.values())), "seconds": counts["seconds"]}
    return {"kills": len(points), "points": [*map(str, points)], "lost": lost, **facts}


def main() -> None:
    """Measure both kinds of batching and write results/generation_kills.json."""
    results = {}
    for batching in ("padded", "continuous"):
        with tempfile.TemporaryDirectory() as folder:
            results[batching] = measure(batching, Path(folder))
    kills, lost = (
        sum(part["kills"] for part in results.values()),
        sum(len(part["lost"]) for part in results.values()),
    )
    write_json(RESULT, {"environment": environment("cpu"), "kills": kills, "lost": lost, **results})
    print(f"{kills} kills ({signal.SIGKILL.name}), {lost} lost something")


if __name__ == "__main__":
    main()
