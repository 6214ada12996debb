"""Images: a ViT for the digits of scikit-learn, with a teacher and with labels alone.

python digits.py SEED      prints JSON; see `run.py`
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from transformers import (
    EvalPrediction,
    Trainer,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from hf_distill import DistillConfig, DistillTrainer

OPTIONS: dict[str, Any] = {
    "per_device_eval_batch_size": 100,
    "save_strategy": "no",
    "logging_steps": 10_000,
    "report_to": "none",
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "lr_scheduler_type": "cosine",
}


def train(
    model: nn.Module, data: dict[str, Any], metric: str, teacher: nn.Module | None = None, **fields: Any
) -> float:
    """Train a model, with a teacher if there is one, and return its metric on the held-out rows."""
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(folder, **OPTIONS | fields)
        trainer: Trainer = DistillTrainer(model, args, teacher=teacher, **data)
        trainer.train()
        return trainer.evaluate()[f"eval_{metric}"]


def compare(
    student: Callable[[], nn.Module], teacher: nn.Module, data: dict[str, Any], metric: str, seed: int, **fields: Any
) -> dict[str, Any]:
    """Train the student with the teacher and on labels alone, from the same start and with the same batches."""
    results: dict[str, Any] = {}
    for name, of_student in (("student", teacher), ("control", None)):
        set_seed(seed)
        model = student()
        alpha = fields["alpha"] if of_student else 0.0
        temperature = {} if of_student else {"temperature": DistillConfig.temperature}
        results[name] = train(model, data, metric, of_student, **fields | {"alpha": alpha, "seed": seed} | temperature)
        results[f"{name}_parameters"] = sum(p.numel() for p in model.parameters())
    return results | {"teacher_parameters": sum(p.numel() for p in teacher.parameters())}


def vit(layers: int, width: int) -> ViTForImageClassification:
    """Return a ViT with random weights for images of 8 x 8 pixels, in patches of 2 x 2."""
    size = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width)
    return ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=2, num_channels=1, num_labels=10))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Return the share of the rows whose class is predicted."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def digits(seed: int) -> dict[str, Any]:
    """Distill a ViT of 6 layers into one of 2, on the digits of scikit-learn: 300 training rows, 797 held out."""
    images, labels = load_digits(return_X_y=True)
    rows = [
        {"pixel_values": torch.tensor(image, dtype=torch.float32).view(1, 8, 8) / 8 - 1, "labels": int(label)}
        for image, label in zip(images, labels, strict=True)
    ]
    random.Random(0).shuffle(rows)
    data = {"eval_dataset": rows[1000:], "compute_metrics": accuracy}
    set_seed(0)  # one teacher for all seeds
    teacher = vit(6, 96)
    of_teacher = train(
        teacher, data | {"train_dataset": rows[:1000]}, "accuracy", max_steps=600, learning_rate=1e-3,
        per_device_train_batch_size=50, warmup_steps=50, seed=0,
    )  # fmt: skip
    of_student = compare(
        lambda: vit(2, 48), teacher, data | {"train_dataset": rows[:300]}, "accuracy", seed, max_steps=600,
        learning_rate=1e-3, per_device_train_batch_size=50, warmup_steps=50, alpha=0.9, temperature=4.0,
    )  # fmt: skip
    return {"teacher": of_teacher, **of_student}


if __name__ == "__main__":
    print(json.dumps(digits(int(sys.argv[1]))))
