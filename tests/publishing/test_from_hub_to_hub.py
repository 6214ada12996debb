"""The whole way, as its users go it: a recipe, a teacher and data from the Hub, and the student back to it."""

import json
import os
import subprocess
import sys

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from hf_distill.runner.model_loading import resolve_model

RECIPE = """\
# A tiny teacher into three of its blocks.
student: {from_teacher: {keep_layers: 3}}
teacher: {model: org/teacher}
data: {task: {path: org/rows}, eval: {path: held-out.jsonl}, max_length: 32}
train: {output_dir: runs/there, max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1}
"""


@pytest.fixture
def stocked(hub, tmp_path):
    """A Hub with a teacher, a data set and a recipe; the program on it."""
    from pathlib import Path

    model = Path(resolve_model("smoke:llama/teacher"))
    card = b"---\nlicense: gemma\n---\n# Teacher\n"
    hub.put("models", "org/teacher", {p.name: p.read_bytes() for p in model.iterdir()} | {"README.md": card})
    text = "".join(json.dumps({"text": f"Row {i} says that {i} squared is {i * i}."}) + "\n" for i in range(64))
    hub.put("datasets", "org/rows", {"train.jsonl": text.encode()})
    hub.put(
        "models",
        "org/recipes",
        {"there.yaml": RECIPE.encode(), "held-out.jsonl": text[:400].rpartition("\n")[0].encode()},
    )

    def program(*words, **environment):
        return subprocess.run(
            [sys.executable, "-m", "hf_distill", *words],
            cwd=tmp_path,
            env=os.environ | hub.environment(tmp_path / "home") | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    return program


def test_from_the_hub_to_the_hub(stocked, hub, tmp_path):
    at = "hf://org/recipes@main/there.yaml"
    refused = stocked("run", at)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    done = stocked("run", at, "--yes", "train.push_to_hub=true", "train.hub_model_id=student")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "org/teacher" in done.stdout
    commits = {name: repo.at("main") for (_, name), repo in hub.repos.items()}
    card = ModelCard.load("tester/student")
    assert (card.data.base_model, card.data.license, card.data.datasets) == (["org/teacher"], "gemma", ["org/rows"])
    evidence = json.loads((tmp_path / "runs" / "there" / "results.json").read_text())
    assert evidence["provenance"]["teacher"]["revision"] == commits["org/teacher"]
    assert evidence["provenance"]["data task"]["revision"] == commits["org/rows"]
    assert evidence["origin"] == f"hf://org/recipes@{commits['org/recipes']}/there.yaml"
    for commit in (commits["org/teacher"], commits["org/rows"]):
        assert commit[:12] in card.text
    assert AutoModelForCausalLM.from_pretrained("tester/student").config.num_hidden_layers == 3
    again = stocked("run", at, "--yes", "train.output_dir=runs/again", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stdout + again.stderr
