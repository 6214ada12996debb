"""Trains and evaluates what an example script passes to its trainer on all ranks; rank 0 writes the results.

python scripts_on_ranks.py FOLDER NAME...
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from example_scripts import DISTILLING, SCRIPTS
from torch import nn

folder, world = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))


def without_dropout(model: nn.Module) -> nn.Module:
    """Return the model with all dropout probabilities set to 0; ranks draw different masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model


def run(name: str) -> dict:
    """Train and evaluate; return the logs, the metrics and a sum over the weights."""
    situation = SCRIPTS[name]()
    cls, config = DISTILLING[situation.base]
    args = config(
        str(folder / name),
        max_steps=6,
        per_device_train_batch_size=8 // world // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        disable_tqdm=True,
        **situation.fields,
    )
    trainer = situation.subclass(cls)(
        model=without_dropout(situation.model(0)), args=args, teacher=situation.model(1, 3), **situation.trainer
    )
    trainer.train()
    metrics = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "soft_loss" in log and "loss" in log]
    weights = torch.stack([p.detach().double().abs().sum() for p in trainer.model.parameters()])
    return {
        "world": trainer.accelerator.num_processes,
        "log": [{k: float(log[k]) for k in ("loss", "soft_loss", "hard_loss", "grad_norm")} for log in logs],
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "time" not in k},
        "weights": weights.tolist(),
    }


if __name__ == "__main__":
    results = {name: run(name) for name in sys.argv[2:]}
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"{world}.json").write_text(json.dumps(results))
