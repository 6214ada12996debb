"""Measure the speed of packed against padded rows, and what mixing two sources adds to a step.

SmolLM2-135M is distilled into 10 of its layers with forward KL at T = 1. Packing: the paragraphs of Python's
documentation that have 20 to 256 tokens, all of them target tokens, as padded batches of 16 or packed into rows of 256
with as many tokens per batch. Only tokens of the examples count, not padding. Mixing: steps on rows of one source and
on the same rows as two sources mixed 7 : 3, with the losses of each source, interleaved in one process. A step includes
fetching and collating its rows.

    python benchmarks/data.py [rounds]
"""

import json
import random
import sys
import tempfile
import time
from pydoc_data.topics import topics

from datasets import Dataset
from measure import interleaved, save
from step import tokenizer
from transformers import TrainerCallback
from trl_sft import models

STEPS, BATCH, LENGTH = 6, 16, 256
CASES = [{"rows": rows} for rows in ("padded", "packed", "mixed")]


class Clock(TrainerCallback):
    """Measures the seconds of the steps after the first, including batches and logs."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.start = time.perf_counter()
        if state.global_step == STEPS:
            self.seconds = time.perf_counter() - self.start


def paragraphs(tok) -> list[dict]:
    results = tok([p for text in topics.values() for p in text.split("\n\n")])["input_ids"]
    rows = [{"input_ids": ids, "labels": ids} for ids in results if 20 <= len(ids) <= LENGTH]
    random.Random(0).shuffle(rows)
    return rows


def trainer_of(data, collator, folder: str, size: int, **options):
    from hf_distill import DistillConfig, DistillTrainer

    student, teacher = models("smollm2")
    args = DistillConfig(
        folder, alpha=1.0, temperature=1.0, max_steps=STEPS, per_device_train_batch_size=size, save_strategy="no",
        report_to="none", dataloader_pin_memory=False, remove_unused_columns=False, disable_tqdm=True, seed=0,
    )  # fmt: skip
    return DistillTrainer(student, args, teacher=teacher, train_dataset=data, data_collator=collator, **options)


def packing(rows: str, folder: str) -> dict:
    from hf_distill.data import Collator, pack

    data, size = Dataset.from_list(paragraphs(tokenizer())[: BATCH * STEPS]), BATCH
    if rows == "packed":
        data = pack(data, LENGTH)
        size = round(len(data) / STEPS)
    collate, tokens, clock = Collator(0), [], Clock()

    def collate_and_count(batch):
        tokens.append(sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    trainer_of(data, collate_and_count, folder, size, callbacks=[clock]).train()
    token_count = sum(tokens[1:STEPS])
    return {"seconds": clock.seconds, "tokens": token_count, "tokens_per_second": token_count / clock.seconds}


def mixing(folder: str) -> dict:
    from hf_distill.data import Collator, mix

    names = ("task", "general")
    rows = Dataset.from_list(paragraphs(tokenizer())[: BATCH * STEPS])
    mixed = mix(dict.fromkeys(names, rows), {"task": 0.7, "general": 0.3}, seed=0).select(range(BATCH * STEPS))
    plain = Dataset.from_list(list(mixed.remove_columns("source")))
    collator, seconds = Collator(0, names), {"one": [], "two": []}
    trainer = trainer_of(plain, collator, folder, BATCH)
    trainer.create_optimizer_and_scheduler(STEPS)
    for step in range(STEPS):
        for sources, data in (("one", plain), ("two", mixed)):
            start = time.perf_counter()
            batch = collator([data[i] for i in range(step * BATCH, (step + 1) * BATCH)])
            assert ("source" in batch) == (sources == "two")
            trainer.training_step(trainer.model, batch)
            trainer.model.zero_grad()
            seconds[sources].append(time.perf_counter() - start)
    one, two = (sum(seconds[sources][1:]) for sources in ("one", "two"))
    return {"one_source_seconds": one, "two_sources_seconds": two, "mixing_adds": two / one - 1}


def measure(case: dict) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        return mixing(folder) if case["rows"] == "mixed" else packing(case["rows"], folder)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    else:
        results = interleaved(__file__, CASES, int(sys.argv[1]) if len(sys.argv) > 1 else 3)
        padded, packed, mixed = results
        gain = packed["tokens_per_second"] / padded["tokens_per_second"]
        save("data", {"packed_times_padded": gain, "mixing_adds": mixed["mixing_adds"], "cases": results})
