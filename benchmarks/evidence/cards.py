"""Write model cards of the students as `hf-distill publish` does, with a Hub server on the loopback address."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from cells import CELLS

ROOT = Path(__file__).resolve().parent.parent.parent
CARDS = ROOT / "model_cards"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
sys.path.insert(0, str(ROOT / "tests"))


def cards(work: Path) -> None:
    """Write the missing cards of the students in `work`."""
    for cell, spec in CELLS.items():
        if spec.card and (work / f"{cell}-0" / "student").is_dir() and not (CARDS / spec.card / "README.md").is_file():
            publish(work / f"{cell}-0", spec.card)


def publish(run: Path, name: str) -> None:
    """Diagnose a run, write its report, publish its student, and copy the uploaded files except the weights."""
    from hub_server import Hub

    with tempfile.TemporaryDirectory() as home, Hub() as hub:
        hub.user, repo = "you", f"you/{name}"
        hub.put("models", BASE, {"README.md": b"---\nlicense: apache-2.0\n---\n"})
        for arguments in (
            ["diagnose", str(run)],
            ["report", str(run)],
            ["publish", str(run), repo, "--base-model", BASE],
        ):
            command = [sys.executable, "-m", "hf_distill", *arguments]
            # The exit code of a diagnosis with findings is not 0.
            code = subprocess.run(command, env=os.environ | hub.environment(Path(home)), cwd=ROOT).returncode
            if code and arguments[0] != "diagnose":
                raise RuntimeError(f"{' '.join(arguments)} ended with {code}")
        published = hub.repos["models", repo]
        for path, content in published.commits[published.branches["main"]].items():
            if path in ("README.md", "distillation.json") or path.startswith("figures/"):
                file = CARDS / name / path
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(hub.content(content))
