"""A few steps of a tiny pair, on as many ranks as there are; rank 0 writes what it saw.

python ddp_run.py FOLDER [features] [zero3] [resume]
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import build, collate, rows

from hf_distill import DistillConfig, DistillTrainer

folder, variants, global_batch = Path(sys.argv[1]), sys.argv[2:], 8
world = int(os.environ.get("WORLD_SIZE", 1))
ZERO3 = {
    "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}
FEATURES = [
    {"name": "hidden_mse", "weight": 0.1},
    {"name": "hidden_cosine", "layers": "learned"},
    {"name": "attention_kl", "layers": "last:1"},
    {"name": "value_relation", "layers": "last:1"},
]


def run(name: str, resume: str | None) -> tuple[DistillTrainer, dict]:
    """Train, evaluate, and say what was seen."""
    student, teacher = build("llama", 0), build("llama", 1, layers=3, width=48)
    for model in (student, teacher):
        model.set_attn_implementation("eager")
    args = DistillConfig(  # after the models: ZeRO-3 would shard the teacher too
        str(folder / name),
        max_steps=4,
        per_device_train_batch_size=global_batch // world // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        save_strategy="steps" if "features" in variants else "no",
        save_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        losses=FEATURES if "features" in variants else None,
        projectors={"learning_rate": 1e-2} if "features" in variants else None,
        deepspeed=ZERO3 if "zero3" in variants else None,
    )
    trainer = DistillTrainer(
        student,
        args,
        teacher=teacher,
        train_dataset=rows("llama", 32),
        eval_dataset=rows("llama", 7, seed=5),
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=resume)
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / f"{name}-saved"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    keys = [k for k in logs[0] if k.endswith("loss") or k == "grad_norm"]
    return trainer, {
        "world": trainer.accelerator.num_processes,
        "log": [{k: float(log[k]) for k in keys} for log in logs],
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "time" not in k},
    }


if __name__ == "__main__":
    name = "resumed" if "resume" in variants else "straight"
    trainer, seen = run(name, str(folder / "straight" / "checkpoint-2") if "resume" in variants else None)
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(seen))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
