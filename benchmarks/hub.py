"""What is claimed of the Hub, against one on loopback: seconds to check recipes, and what interrupted pushes leave.

python hub.py [RUN]     RUN: a run's folder; by default a smoke run of the quickstart is made
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
    """Of the whole packaged set, in a fresh process each."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        subprocess.run([*PROGRAM, "recipes", "validate"], check=True, capture_output=True)
        found.append(time.perf_counter() - start)
    return found


def torch_is_imported() -> bool:
    """By checking the packaged set."""
    code = (
        "import sys; from hf_distill.recipe import list_recipes, load_recipe\n"
        "[load_recipe(name) for name in list_recipes()]; assert 'torch' not in sys.modules"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode != 0


class Killer(Hub):
    """A Hub at whose n-th request from now on the process that asks is killed, before or after it is answered."""

    left, victim = 0, None

    def fault(self, request: str):
        """Count, and kill."""
        self.left -= 1
        if self.left == 0 and self.victim is not None:
            os.kill(self.victim.pid, signal.SIGKILL)
        return super().fault(request)


def publish(hub: Killer, run: Path, home: Path, kill_at: int = 0) -> int:
    """By the program; its exit code."""
    with hub.lock:
        command = [*PROGRAM, "publish", str(run), REPO[1], "--allow-smoke"]
        environ = os.environ | hub.environment(home)
        hub.victim = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        hub.left = kill_at
    hub.victim.communicate()
    return hub.victim.returncode


def state_of(hub: Hub) -> tuple:
    repo = hub.repos[REPO]
    return repo.at("main"), len(repo.commits)


def interrupted(run: Path, home: Path) -> dict:
    """Kill pushes of a changed student at requests from first to last, then push it whole."""
    with Killer() as hub:
        assert publish(hub, run, home) == 0
        hub.requests.clear()
        student = run / "student" / "model.safetensors"
        save_file({name: value - 1 for name, value in load_file(student).items()}, student, {"format": "pt"})
        assert publish(hub, run, home) == 0
        counted, half_changed, killed = len(hub.requests), 0, 0
        for number in range(INTERRUPTIONS):
            weights = {name: value + 1 for name, value in load_file(student).items()}
            save_file(weights, student, {"format": "pt"})
            before = state_of(hub)
            code = publish(hub, run, home, kill_at=1 + number * (counted - 1) // (INTERRUPTIONS - 1))
            killed += code == -signal.SIGKILL
            after = state_of(hub)
            whole = after == before or after[1] == before[1] + 1
            half_changed += not whole
            assert publish(hub, run, home) == 0
        twice = len(hub.uploaded) - len(set(hub.uploaded))
        files = hub.repos[REPO].commits[hub.repos[REPO].at("main")]
        theirs = hub.content(files["model.safetensors"])
        return {
            "requests_of_a_push": counted,
            "interruptions": INTERRUPTIONS,
            "killed": killed,
            "half_changed": half_changed,
            "uploaded_twice": twice,
            "round_trip_bit_equal": theirs == student.read_bytes() and downloaded_equal(hub, student, home),
        }


def downloaded_equal(hub: Hub, student: Path, home: Path) -> bool:
    """Whether from_pretrained brings back each tensor to the bit."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from safetensors.torch import load_file\n"
        "own, theirs = load_file(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[2]).state_dict()\n"
        "print(all(torch.equal(value, theirs[name]) for name, value in own.items()))"
    )
    command = [sys.executable, "-c", code, str(student), REPO[1]]
    environ = os.environ | hub.environment(home)
    said = subprocess.run(command, env=environ, capture_output=True, text=True, check=True).stdout
    return said.strip().endswith("True")


def main() -> None:
    """Write results/hub.json."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run = folder / "run"
        if len(sys.argv) > 1:
            shutil.copytree(sys.argv[1], run)
        else:
            command = [*PROGRAM, "run", "quickstart", "--smoke", f"train.output_dir={run}"]
            subprocess.run(command, check=True, capture_output=True)
        times = seconds_to_validate()
        found = {
            "environment": environment("cpu"),
            "validate": {
                "recipes": len(list_recipes()),
                "median_s": round(statistics.median(times), 3),
                "max_s": round(max(times), 3),
                "imports_torch": torch_is_imported(),
            },
            "pushes": interrupted(run, folder / "home"),
        }
    write_json(Path(__file__).parent / "results" / "hub.json", found)
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
