"""Compare quantization-aware distillation with rounding after training: held-out metrics and sizes of the exports.

Runs the recipe quantized-student (SmolLM2-135M-Instruct, 15 of its 30 layers, 40 steps of 512 tokens), whose control is
the same student in full precision, evaluated in full precision and with weights that are rounded after training.

    python benchmarks/quantized_student.py          # the seeds that are missing; 8 minutes of one core each
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean

from measure import RESULTS, save

MODELS = {"full_precision": "full precision", "quantized_after": "quantized after training", "student": "QAD"}
METRICS = ("perplexity", "kl", "agreement")
SEEDS = (0, 1, 2)


def one(seed: int, folder: Path) -> dict:
    """Train the recipe with a seed; return the metrics of the three students, and the bytes of their weights."""
    from hf_distill.core.io import read_results
    from hf_distill.recipe import load_recipe, run_recipe

    run_recipe(load_recipe("quantized-student", [f"train.output_dir={folder}", f"train.seed={seed}"]))
    results = read_results(folder / "results.json")
    models = results["models"]
    base = models["full_precision"]["perplexity"]
    return {
        "seed": seed,
        "quantization": results["student"]["quantization"],
        "parameters": results["student"]["parameters"],
        "steps": results["steps"],
        "teacher_perplexity": models["student"]["teacher_perplexity"],
        "students": {
            title: {name: models[key][name] for name in METRICS}
            | {"perplexity_relative_to_full_precision": models[key]["perplexity"] / base - 1}
            for key, title in MODELS.items()
        },
        "bytes": {name: (folder / name / "model.safetensors").stat().st_size for name in ("student", "full_precision")},
        "environment": results["environment"],
    }


def main() -> None:
    """Run the seeds that are missing, a process each, and write the means over the seeds beside the runs."""
    file = RESULTS / "quantized_student.json"
    runs = json.loads(file.read_text()).get("runs", []) if file.is_file() else []
    for seed in sorted(set(SEEDS) - {run["seed"] for run in runs}):
        done = subprocess.run([sys.executable, __file__, str(seed)], capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout.strip().splitlines()[-1]))
        means = {
            title: {name: mean(run["students"][title][name] for run in runs) for name in values}
            for title, values in runs[0]["students"].items()
        }
        save(
            "quantized_student",
            {"recipe": "quantized-student", "students": means, "bytes": runs[0]["bytes"], "runs": runs},
        )
        print(seed, runs[-1]["students"], flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        with tempfile.TemporaryDirectory() as temporary:
            print(json.dumps(one(int(sys.argv[1]), Path(temporary) / "run")))
    else:
        main()
