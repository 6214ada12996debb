"""Compare quantization-aware distillation with rounding after training: held-out metrics and sizes of the exports.

Runs the recipe quantized-student (SmolLM2-135M-Instruct, 15 of its 30 layers, 40 steps of 512 tokens), whose control is
the same student in full precision, evaluated in full precision and with weights that are rounded after training.

    python benchmarks/quantized_student.py          # 8 minutes of one core
    python benchmarks/quantized_student.py RUN      # reads a finished run of the recipe
"""

import sys
import tempfile
from pathlib import Path

from measure import save

MODELS = {"full_precision": "full precision", "quantized_after": "quantized after training", "student": "QAD"}
METRICS = ("perplexity", "kl", "agreement")


def run(folder: str) -> Path:
    from hf_distill.recipe import load_recipe, run_recipe

    return run_recipe(load_recipe("quantized-student", [f"train.output_dir={folder}/run"])).folder


def collect(folder: Path) -> dict:
    """Return the metrics of the three students, and the bytes of their weights."""
    from hf_distill.core.io import read_results

    results = read_results(folder / "results.json")
    models = results["models"]
    base = models["full_precision"]["perplexity"]
    return {
        "recipe": "quantized-student",
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


if __name__ == "__main__":
    if len(sys.argv) > 1:
        collected = collect(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            collected = collect(run(temporary))
    save("quantized_student", collected)
    print(collected["students"])
