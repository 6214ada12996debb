"""Measure a step of classifiers and question answering beside a `Trainer` whose `compute_loss` runs the teacher.

The compared trainer is the one of the guides: it adds the teacher's forward and the KL in a few lines. BERT of 12 and 6
layers of width 384 with 8 rows of 128 tokens, ViT of 12 and 6 layers of width 192 with 8 images of 224 pixels. The
figures are CPU seconds of one thread.

    python benchmarks/model_types.py [rounds]
"""

import json
import statistics
import sys
import tempfile
import time

import torch
from measure import interleaved, save
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

ROWS, LENGTH, STEPS, WARM = 8, 128, 12, 3
TEXT = dict(vocab_size=30522, hidden_size=384, num_attention_heads=12, intermediate_size=1536)
IMAGE = dict(hidden_size=192, num_attention_heads=3, intermediate_size=768)


def bert(cls, layers: int, **options):
    return cls(BertConfig(**TEXT, num_hidden_layers=layers, **options))


MODELS = {
    "row classes": lambda layers: bert(BertForSequenceClassification, layers, num_labels=4),
    "token classes": lambda layers: bert(BertForTokenClassification, layers, num_labels=9),
    "spans": lambda layers: bert(BertForQuestionAnswering, layers),
    "image classes": lambda layers: ViTForImageClassification(ViTConfig(**IMAGE, num_hidden_layers=layers)),
}


def rows(kind: str, count: int) -> list[dict]:
    """Return random rows; those of text have no padding."""
    draw = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        if kind == "image classes":
            result.append({"pixel_values": torch.randn(3, 224, 224, generator=draw), "labels": i % 2})
            continue
        row = {"input_ids": torch.randint(1000, 30000, (LENGTH,), generator=draw)}
        row["attention_mask"] = torch.ones_like(row["input_ids"])
        if kind == "spans":
            row |= {"start_positions": i % 50, "end_positions": 60 + i % 50}
        else:
            row["labels"] = torch.arange(LENGTH) % 9 if kind == "token classes" else i % 4
        result.append(row)
    return result


class TrainerOfTheGuides(Trainer):
    """A `Trainer` that adds the KL to the loss of the model."""

    def __init__(self, *args, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.teacher = teacher.eval().requires_grad_(False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        with torch.no_grad():
            teacher = self.teacher(**inputs)
        if hasattr(outputs, "start_logits"):
            pairs = [(getattr(outputs, name), getattr(teacher, name)) for name in ("start_logits", "end_logits")]
        else:
            pairs = [(outputs.logits, teacher.logits)]
        kl = sum(self.kl(student, of_teacher) for student, of_teacher in pairs) / len(pairs)
        loss = 0.5 * kl + 0.5 * outputs.loss
        return (loss, outputs) if return_outputs else loss

    @staticmethod
    def kl(student, teacher, temperature=2.0):
        student, teacher = (F.log_softmax(z / temperature, -1).flatten(0, -2) for z in (student, teacher))
        return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


class Clock(TrainerCallback):
    """Measures the CPU seconds of each step; unlike the time, they hardly depend on what else the machine does."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.start = time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.process_time() - self.start)


def step(case: dict) -> dict:
    """Train for some steps and return the median of their seconds."""
    from hf_distill import DistillConfig, DistillTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    student, teacher = (MODELS[case["outputs"]](layers) for layers in (6, 12))
    is_ours = case["trainer"] == "DistillTrainer"
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = (DistillConfig if is_ours else TrainingArguments)(
            folder, max_steps=STEPS, per_device_train_batch_size=ROWS, save_strategy="no", report_to="none",
            dataloader_pin_memory=False, disable_tqdm=True, logging_steps=100,
        )  # fmt: skip
        cls = DistillTrainer if is_ours else TrainerOfTheGuides
        data = rows(case["outputs"], ROWS * STEPS)
        cls(model=student, args=args, train_dataset=data, callbacks=[clock], teacher=teacher).train()
    return {"seconds": statistics.median(clock.seconds[WARM:])}


CASES = [{"outputs": o, "trainer": t} for o in MODELS for t in ("Trainer of the guides", "DistillTrainer")]

if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(step(json.loads(sys.argv[1]))))
    else:
        cases = interleaved(__file__, CASES, int(sys.argv[1]) if len(sys.argv) > 1 else 5)
        ratios = {b["outputs"]: b["seconds"] / a["seconds"] for a, b in zip(cases[::2], cases[1::2], strict=True)}
        save("model_types", {"ratios": ratios, "cases": cases})
        print(ratios)
