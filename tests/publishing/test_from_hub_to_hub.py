"""End to end: a recipe, a teacher and data from the Hub, and the student published on the Hub."""

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
train: {output_dir: runs/first, max_steps: 2, per_device_train_batch_size: 2, logging_steps: 1}
"""


@pytest.fixture
def run_program(hub, tmp_path):
    """A Hub with a teacher, a dataset and a recipe; returns a function that runs the program with this Hub."""
    from pathlib import Path

    model = Path(resolve_model("smoke:llama/teacher"))
    card = b"---\nlicense: gemma\n---\n# Teacher\n"
    hub.put("models", "org/teacher", {p.name: p.read_bytes() for p in model.iterdir()} | {"README.md": card})
    text = "".join(json.dumps({"text": f"Row {i} says that {i} squared is {i * i}."}) + "\n" for i in range(64))
    hub.put("datasets", "org/rows", {"train.jsonl": text.encode()})
    hub.put(
        "models",
        "org/recipes",
        {"recipe.yaml": RECIPE.encode(), "held-out.jsonl": text[:400].rpartition("\n")[0].encode()},
    )

    def program(*arguments, **environment):
        return subprocess.run(
            [sys.executable, "-m", "hf_distill", *arguments],
            cwd=tmp_path,
            env=os.environ | hub.environment(tmp_path / "home") | environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )

    return program


def test_a_student_of_a_hub_recipe_is_published_with_the_commits_that_it_read(run_program, hub, tmp_path):
    uri = "hf://org/recipes@main/recipe.yaml"
    refused = run_program("run", uri)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    done = run_program("run", uri, "--yes", "train.push_to_hub=true", "train.hub_model_id=student")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "org/teacher" in done.stdout
    commits = {name: repo.at("main") for (_, name), repo in hub.repos.items()}
    card = ModelCard.load("tester/student")
    assert (card.data.base_model, card.data.license, card.data.datasets) == (["org/teacher"], "gemma", ["org/rows"])
    results = json.loads((tmp_path / "runs" / "first" / "results.json").read_text())
    assert results["provenance"]["teacher"]["revision"] == commits["org/teacher"]
    assert results["provenance"]["data task"]["revision"] == commits["org/rows"]
    assert results["origin"] == f"hf://org/recipes@{commits['org/recipes']}/recipe.yaml"
    for commit in (commits["org/teacher"], commits["org/rows"]):
        assert commit[:12] in card.text
    assert AutoModelForCausalLM.from_pretrained("tester/student").config.num_hidden_layers == 3
    second = run_program("run", uri, "--yes", "train.output_dir=runs/second", HF_HUB_OFFLINE="1")
    assert second.returncode == 0, second.stdout + second.stderr
