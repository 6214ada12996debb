"""Draft models for speculative decoding: the recipe `draft` by divergence and seed, and multi-token prediction heads.

python draft.py

Each run is a process of its own. The draft models of a run (before training, distilled, control on hard labels) and the
heads complete the same held-out prompts greedily. The result is in results/draft.json.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from hf_distill.analysis import measure_drafts_of, open_run
from hf_distill.analysis.model_pair import ModelPair, load_model
from hf_distill.analysis.run_models import prompt_length
from hf_distill.core.defaults import DRAFT_NEW_TOKENS, DRAFT_PROMPTS, PROMPT_TOKENS
from hf_distill.core.io import environment, read_json, write_json
from hf_distill.recipe import load_recipe, run_recipe
from hf_distill.teachers.mtp.generation import generate_with_mtp
from hf_distill.teachers.mtp.heads import load_heads

RESULT = Path(__file__).parent / "results" / "draft.json"
CASES = [
    *({"recipe": "draft", "divergence": "forward_kl", "seed": seed} for seed in (0, 1, 2)),
    {"recipe": "draft", "divergence": "total_variation", "seed": 0},
    {"recipe": "mtp", "seed": 0},
]


def measure_student(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train a draft model, and measure it beside the others of its run."""
    changes = [f"distill.divergence={case['divergence']}", f"train.seed={case['seed']}", f"train.output_dir={folder}"]
    run_recipe(load_recipe("draft", changes))
    run = open_run(folder)
    names = ("perplexity", "kl", "agreement", "teacher_perplexity")
    models = {name: {key: m[key] for key in names if key in m} for name, m in run.results["models"].items()}
    return asdict(measure_drafts_of(run)) | {"held_out": models}


def measure_heads(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train multi-token prediction heads, and count the drafted tokens that the model itself accepts."""
    recipe = load_recipe("mtp", [f"train.seed={case['seed']}", f"train.output_dir={folder}", "control=null"])
    run_recipe(recipe)
    student = open_run(folder).path("student")
    model = load_model(student, torch.device("cpu"))
    heads = load_heads(model, student).eval()
    pair = ModelPair.of_recipe(load_recipe("draft"))  # the same held-out rows
    stride = max(1, len(pair.rows) // DRAFT_PROMPTS)
    rows = [pair.rows[i * stride] for i in range(DRAFT_PROMPTS)]
    accepted = []
    for row in rows:
        prompt = torch.tensor([row["input_ids"][: prompt_length(row, PROMPT_TOKENS)]])
        accepted += generate_with_mtp(model, heads, prompt, DRAFT_NEW_TOKENS).accepted
    return {"accepted_tokens": mean(accepted), "heads": len(heads), "forwards": len(accepted)}


def main() -> None:
    """Measure all cases, one process each; those of an earlier, interrupted call are not run again."""
    results = read_json(RESULT).get("cases", [])
    for case in CASES:
        if any(result["case"] == case for result in results):
            continue
        done = subprocess.run([sys.executable, __file__, json.dumps(case)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{case}\n{done.stderr[-3000:]}")
        results.append({"case": case} | json.loads(done.stdout.strip().splitlines()[-1]))
        print(results[-1], flush=True)
        write_json(RESULT, {"environment": environment("cpu"), "cases": results})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        case = json.loads(sys.argv[1])
        measure = measure_heads if case["recipe"] == "mtp" else measure_student
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(measure(case, Path(temporary) / "run")))
    else:
        main()
