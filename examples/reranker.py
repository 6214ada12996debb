"""Distill a cross-encoder that scores pairs of query and document into a smaller one, with MarginMSE.

For: a reranker of search results that must be fast.
Needs: one GPU with 16 GB for the default models (an estimate), and `pip install .`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/reranker.py --dataset triples.jsonl --output_dir runs/reranker

Each row of the data set has the texts `query`, `positive` and `negative`. The student learns the teacher's difference
of scores of both documents. For a teacher with another tokenizer use `DualProcessorCollator` (docs/model-types.md).
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_distill import DistillConfig, DistillTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="cross-encoder/ms-marco-TinyBERT-L2-v2")
parser.add_argument("--teacher", default="cross-encoder/ms-marco-MiniLM-L12-v2")
parser.add_argument("--dataset", required=True, help="file of JSON lines, or Hub id")
parser.add_argument("--dataset_config", default=None, help="configuration of a data set on the Hub, such as triplet")
parser.add_argument("--output_dir", default="runs/reranker")
parser.add_argument("--max_rows", type=int, default=100_000)
parser.add_argument("--max_steps", type=int, default=5000)
parser.add_argument("--batch_size", type=int, default=64, help="rows; even, because two rows are a pair")
parser.add_argument("--max_length", type=int, default=256)
parser.add_argument("--learning_rate", type=float, default=3e-5)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

is_file = Path(arguments.dataset).is_file()
source = {"path": "json", "data_files": arguments.dataset} if is_file else {"path": arguments.dataset}
triples = load_dataset(**source, name=arguments.dataset_config, split="train")
if not {"query", "positive", "negative"} <= {*triples.column_names}:
    raise SystemExit(f"The columns are {triples.column_names}; the script reads query, positive and negative.")
parts = triples.select(range(min(arguments.max_rows, len(triples)))).train_test_split(arguments.held_out_share, seed=0)
tokenizer = AutoTokenizer.from_pretrained(arguments.student)


def tokenize(batch: dict) -> dict:
    """Make two rows of each triple, the positive document (label 1) followed by the negative one (label 0)."""
    queries = [query for query in batch["query"] for _ in range(2)]
    documents = [text for pair in zip(batch["positive"], batch["negative"], strict=True) for text in pair]
    rows = tokenizer(queries, documents, truncation=True, max_length=arguments.max_length)
    return {**rows, "labels": [1.0, 0.0] * len(batch["query"])}


rows = parts.map(tokenize, batched=True, remove_columns=triples.column_names)
trainer = DistillTrainer(
    model=AutoModelForSequenceClassification.from_pretrained(arguments.student, num_labels=1),
    teacher=AutoModelForSequenceClassification.from_pretrained(arguments.teacher, num_labels=1),
    args=DistillConfig(
        arguments.output_dir,
        divergence="margin_mse",
        alpha=1.0,  # the teacher alone: its scores have another scale than the labels
        train_sampling_strategy="sequential",  # keeps the two rows of a pair in one batch; the triples are shuffled
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        bf16=torch.cuda.is_available(),
        logging_steps=10,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    data_collator=DataCollatorWithPadding(tokenizer),
    train_dataset=rows["train"],
    eval_dataset=rows["test"],
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
print(f"eval_loss: {before['eval_loss']:.4f} before training, {after['eval_loss']:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)
