"""A few steps of a tiny pair, on as many ranks as there are; rank 0 writes what it saw."""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import build, collate, rows

from hf_distill import DistillConfig, DistillTrainer

folder, global_batch = Path(sys.argv[1]), 8
world = int(os.environ.get("WORLD_SIZE", 1))
args = DistillConfig(
    str(folder / "out"),
    max_steps=4,
    per_device_train_batch_size=global_batch // world // 2,
    gradient_accumulation_steps=2,
    per_device_eval_batch_size=2,
    logging_steps=1,
    save_strategy="no",
    learning_rate=1e-3,
    use_cpu=True,
    dataloader_pin_memory=False,
    train_sampling_strategy="sequential",
)
trainer = DistillTrainer(
    build("llama", 0),
    args,
    teacher=build("llama", 1, layers=3, width=48),
    train_dataset=rows("llama", 32),
    eval_dataset=rows("llama", 7, seed=5),
    data_collator=collate,
)
trainer.train()
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    keys = ("loss", "soft_loss", "hard_loss", "grad_norm")
    seen = {
        "world": trainer.accelerator.num_processes,
        "log": [{k: float(log[k]) for k in keys} for log in trainer.state.log_history if "loss" in log],
        "metrics": {k: metrics[k] for k in ("eval_loss", "eval_kl", "eval_perplexity", "eval_agreement")},
        "weights": {n: p.double().sum().item() for n, p in trainer.model.named_parameters()},
    }
    (folder / "seen.json").write_text(json.dumps(seen))
trainer.accelerator.wait_for_everyone()
trainer.end()
