"""Compare DistillSFTTrainer with TRL's GKDTrainer and SFTTrainer on the same rows, order, initial student and tokens.

Rows are conversations of one question and a text as its answer, whose tokens are the target tokens. Each trainer runs
in a separate process, one after the other. All students are measured by the evaluation of `DistillSFTTrainer`, on the
held-out conversations.

python peers.py PEER SEED     prints JSON; see `run.py`
"""

import ctypes
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from cells import BATCH, LENGTH, RATE, STEPS, TEACHER
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

sys.path.insert(0, str(Path(__file__).parent.parent))
from measure import status_mib

from hf_distill.models.pruning import cut_student
from hf_distill.runner.model_loading import resolve_model
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

WARM = 4  # steps that are not timed
ANSWER = LENGTH - 48  # tokens
_COMMON: dict[str, Any] = {
    "max_steps": STEPS, "per_device_train_batch_size": BATCH, "max_length": LENGTH, "learning_rate": RATE,
    "lr_scheduler_type": "cosine", "warmup_steps": 4, "save_strategy": "no", "logging_steps": 1000,
    "report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True, "bf16": False,
    "gradient_checkpointing": False, "remove_unused_columns": True,
}  # fmt: skip
_HELD_OUT = {**_COMMON, "per_device_eval_batch_size": BATCH, "alpha": 1.0, "temperature": 1.0}


class Meter(TrainerCallback):
    """Measure tokens per second after the first steps, and peak memory beyond weights, gradients and optimizer."""

    def __init__(self, student: torch.nn.Module):
        self.tokens = 0
        student.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, _args, kwargs):
        if module.training:
            mask = kwargs.get("attention_mask")
            self.tokens += kwargs["input_ids"].numel() if mask is None else int(mask.sum())

    def on_step_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
        if state.global_step == WARM:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            gradient_bytes = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            # Resident already: the weights of both models and the moments of the optimizer. The gradients come later.
            self.stays = status_mib("VmRSS") + gradient_bytes / 2**20
            Path("/proc/self/clear_refs").write_text("5")
            self.start, self.before = time.perf_counter(), self.tokens

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == STEPS:
            self.seconds = time.perf_counter() - self.start
            self.pace, self.peak = (self.tokens - self.before) / self.seconds, status_mib("VmHWM") - self.stays


def conversations(file: Path, tokenizer: Any) -> Dataset:
    """Return conversations of a question and a text as its answer, short enough that no trainer truncates them."""
    texts = [json.loads(line)["text"] for line in file.read_text().splitlines()]
    texts = [tokenizer.decode(tokenizer(text)["input_ids"][:ANSWER]) for text in texts]
    question = {"role": "user", "content": "Go on."}
    return Dataset.from_list([{"messages": [question, {"role": "assistant", "content": text}]} for text in texts])


def split(rows: Dataset) -> Dataset:
    """Return the conversations as prompts and completions; the completions are the target tokens."""
    return rows.map(
        lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]}, remove_columns=["messages"]
    )


def main(peer: str, seed: int, texts: Path, layers: list[int]) -> dict[str, float]:
    """Train a student with one of the trainers, and return its metrics."""
    path = resolve_model(TEACHER)
    tokenizer = AutoTokenizer.from_pretrained(path)
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    student = cut_student(teacher, layers)
    rows, meter = conversations(texts / "train.jsonl", tokenizer), Meter(student)
    common = {"model": student, "processing_class": tokenizer, "callbacks": [meter]}
    with tempfile.TemporaryDirectory() as folder:
        trainer: Any
        if peer.startswith("gkd"):
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            beta = 0.0 if peer == "gkd_kl" else 0.5
            args = GKDConfig(folder, lmbda=0.0, beta=beta, temperature=1.0, seed=seed, **_COMMON)
            trainer = GKDTrainer(teacher_model=teacher, args=args, train_dataset=rows, **common)
        elif peer == "trl_sft":
            from trl import SFTConfig, SFTTrainer

            args = SFTConfig(folder, seed=seed, completion_only_loss=True, **_COMMON)
            trainer = SFTTrainer(args=args, train_dataset=split(rows), **common)
        else:
            divergence = "forward_kl" if peer == "ours_kl" else "js"
            args = DistillSFTConfig(folder, alpha=1.0, temperature=1.0, divergence=divergence, seed=seed, **_COMMON)
            trainer = DistillSFTTrainer(teacher=teacher, args=args, train_dataset=split(rows), **common)
        trainer.train()
        evaluator = DistillSFTTrainer(
            student,
            DistillSFTConfig(f"{folder}/judge", **_HELD_OUT),
            teacher=teacher,
            train_dataset=split(rows).select(range(2)),
            eval_dataset=split(conversations(texts / "held_out.jsonl", tokenizer)),
            processing_class=tokenizer,
        )
        evaluation = evaluator.evaluate()
    metrics = {key: evaluation[f"eval_{key}"] for key in ("perplexity", "kl", "agreement", "teacher_perplexity")}
    return {**metrics, "tokens_per_second": meter.pace, "peak_mib_over_what_stays": meter.peak, "tokens": meter.tokens}


if __name__ == "__main__":
    import run

    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), run.TEXTS, run.layers())))
