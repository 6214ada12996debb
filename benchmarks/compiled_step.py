"""Measure a training step of `DistillTrainer` without and with compiled layers; all rows have one length.

    python benchmarks/compiled_step.py [rounds]

It runs on the GPU if there is one, in bf16. The first steps, in which the layers are compiled, are measured apart.
"""

import json
import sys
import tempfile
import time
from statistics import median

import torch
from measure import interleaved, save
from step import llama
from transformers import TrainerCallback

STEPS, WARM, BATCH, LENGTH = 12, 3, 4, 256


class Clock(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self):
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_begin(self, args, state, control, **kwargs):
        self.times = [time.perf_counter()]


def one(case: dict) -> dict:
    from hf_distill import DistillConfig, DistillTrainer

    student, teacher, clock = llama(320, 4), llama(576, 6), Clock()
    ids = torch.randint(3, 49152, (STEPS * BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder,
            bf16=torch.cuda.is_available(),
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
            dataloader_pin_memory=False,
            disable_tqdm=True,
            torch_compile=case["compiled"] != "nothing",
            compile_teacher=case["compiled"] == "student and teacher",
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        trainer = DistillTrainer(student, args, teacher=teacher, train_dataset=data, callbacks=[clock])
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"seconds": median(seconds[WARM:]), "warm_up_seconds": sum(seconds[:WARM]), "last_loss": losses[-1]}


CASES = [{"compiled": compiled} for compiled in ("nothing", "student", "student and teacher")]

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(one(json.loads(sys.argv[1]))))
    else:
        rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        save("compiled_step", {"device": device, "cases": interleaved(__file__, CASES, rounds)})
