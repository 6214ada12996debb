"""Measure the seconds to validate recipes, and check that interrupted pushes leave a repository of a local Hub intact.

python hub.py [RUN]     RUN: the folder of a run; by default a smoke run of the quickstart is made
"""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from hub_server import Hub

from hf_distill.core.io import environment, write_json
from hf_distill.recipe import list_recipes

PROGRAM = [sys.executable, "-m", "hf_distill"]
INTERRUPTIONS = 20
REPO = ("models", "tester/student")


def seconds_to_validate(times: int = 9) -> list[float]:
    """Measure the seconds to validate all packaged recipes, each time in a fresh process."""
    times_s = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([*PROGRAM, "recipes", "validate"], check=True, capture_output=True)
        times_s.append(time.perf_counter() - start)
    return times_s


def is_torch_imported() -> bool:
    """Whether loading all packaged recipes imports torch."""
    code = (
        "import sys; from hf_distill.recipe import list_recipes, load_recipe\n"
        "[load_recipe(name) for name in list_recipes()]; assert 'torch' not in sys.modules"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


class KillingHub(Hub):
    """A Hub that kills the requesting process at its n-th request."""

    remaining_requests, process = 0, None

    def fault(self, request: str):
        """Count the request, and kill the process at the n-th one."""
        self.remaining_requests -= 1
        if self.remaining_requests == 0 and self.process is not None:
            os.kill(self.process.pid, signal.SIGKILL)
        return super().fault(request)


def publish(hub: KillingHub, run: Path, home: Path, kill_at: int = 0) -> int:
    """Publish with the program; return its exit code."""
    with hub.lock:
        command = [*PROGRAM, "publish", str(run), REPO[1], "--allow-smoke"]
        environ = os.environ | hub.environment(home)
        hub.process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        hub.remaining_requests = kill_at
    hub.process.communicate()
    return hub.process.returncode


def state_of(hub: Hub) -> tuple:
    repo = hub.repos[REPO]
    return repo.at("main"), len(repo.commits)


def interrupt_pushes(run: Path, home: Path) -> dict:
    """Kill pushes of a changed student at requests from the first to the last, each followed by a complete push."""
    with KillingHub() as hub:
        assert publish(hub, run, home) == 0
        hub.requests.clear()
        student = run / "student" / "model.safetensors"
        save_file({name: value - 1 for name, value in load_file(student).items()}, student, {"format": "pt"})
        assert publish(hub, run, home) == 0
        counted, partial_commits, killed = len(hub.requests), 0, 0
        for number in range(INTERRUPTIONS):
            weights = {name: value + 1 for name, value in load_file(student).items()}
            save_file(weights, student, {"format": "pt"})
            before = state_of(hub)
            code = publish(hub, run, home, kill_at=1 + number * (counted - 1) // (INTERRUPTIONS - 1))
            killed += code == -signal.SIGKILL
            after = state_of(hub)
            is_atomic = after == before or after[1] == before[1] + 1
            partial_commits += not is_atomic
            assert publish(hub, run, home) == 0
        uploaded_twice = len(hub.uploaded) - len(set(hub.uploaded))
        files = hub.repos[REPO].commits[hub.repos[REPO].at("main")]
        published = hub.content(files["model.safetensors"])
        return {
            "requests_of_a_push": counted,
            "interruptions": INTERRUPTIONS,
            "killed": killed,
            "half_changed": partial_commits,
            "uploaded_twice": uploaded_twice,
            "round_trip_bit_equal": published == student.read_bytes() and is_download_equal(hub, student, home),
        }


def is_download_equal(hub: Hub, student: Path, home: Path) -> bool:
    """Whether from_pretrained loads each tensor bit for bit."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from safetensors.torch import load_file\n"
        "local, downloaded = load_file(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[2]).state_dict()\n"
        "print(all(torch.equal(value, downloaded[name]) for name, value in local.items()))"
    )
    command = [sys.executable, "-c", code, str(student), REPO[1]]
    environ = os.environ | hub.environment(home)
    output = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    return output.strip().endswith("True")


def main() -> None:
    """Measure everything and write results/hub.json."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = folder / "run"
        if len(sys.argv) > 1:
            shutil.copytree(sys.argv[1], run)
        else:
            command = [*PROGRAM, "run", "quickstart", "--smoke", f"train.output_dir={run}"]
            subprocess.run(command, check=True, capture_output=True)
        times = seconds_to_validate()
        results = {
            "environment": environment("cpu"),
            "validate": {
                "recipes": len(list_recipes()),
                "median_s": round(statistics.median(times), 3),
                "max_s": round(max(times), 3),
                "imports_torch": is_torch_imported(),
            },
            "pushes": interrupt_pushes(run, folder / "home"),
        }
    write_json(Path(__file__).parent / "results" / "hub.json", results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
