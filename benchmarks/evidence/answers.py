"""Sequence-level distillation: a student of 20 of SmolLM2's 30 layers, on answers about Python's builtins.

python answers.py prepare     answers of the teacher, and the questions, into runs/evidence/answers.json
python answers.py ARM SEED    prints JSON; see `run.py`

The arms differ in who wrote the answers, the data or the teacher, and in the labels, hard or soft. Each optimizer step
has the same number of target tokens in every arm: the last answer of a step is cut.
"""

import json
import random
import sys
import tempfile
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import torch
from cells import ARMS, TEACHER
from digits import OPTIONS
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.core.io import held_out_metrics, read_json, write_json
from hf_distill.core.targets import IGNORE_INDEX
from hf_distill.data.load import load_columns
from hf_distill.generation.backends.local import TransformersBackend
from hf_distill.generation.completion import Prompt, SamplingSettings, make_parts
from hf_distill.models.pruning import block_influence, cut_student, top_layers
from hf_distill.runner.model_loading import resolve_model

FILE = Path("runs/evidence/answers.json")  # of the root
NUM_LAYERS, STEPS, TARGETS, RATE = 20, 24, 256, 8.0e-4  # target tokens of each step
LONGEST, CHOICES = 96, 3  # tokens of an answer, answers to choose from
TRAINING, ANSWERED, HELD_OUT = 250, 110, 48  # questions to train on, those of them that the teacher answers, held out


def load() -> tuple[Any, Any]:
    """Return the teacher and its tokenizer."""
    path = resolve_model(TEACHER)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(path)


def prepare(file: Path = FILE) -> None:
    """Write the ids of prompts and answers, and the layers of the student, unless the file exists."""
    if file.is_file():
        return
    model, tokenizer = load()
    end = tokenizer.eos_token_id
    rows = []
    for question, answer in load_columns("package:builtins")["messages"]:
        prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
        ids = tokenizer(answer["content"], add_special_tokens=False)["input_ids"]
        if len(ids) < LONGEST:
            rows.append({"prompt": prompt, "data": [*ids, end]})
    random.Random(0).shuffle(rows)
    rows = rows[:ANSWERED] + rows[-HELD_OUT:] + rows[ANSWERED:TRAINING]  # the teacher answers the first ones
    settings = SamplingSettings(max_new_tokens=LONGEST, log_probs=False)
    prompts = [row["prompt"] for row in rows]
    backend = TransformersBackend(
        model, tokenizer, lambda request: prompts[request.prompt.index], settings, "padded", 32, {"model": TEACHER}
    )
    (part,) = make_parts([Prompt(i, "task", i, "") for i in range(ANSWERED + HELD_OUT)], 1, 0, len(rows))
    for _, completions in backend.complete([part], lambda count: None):
        for each in completions:
            ids = tokenizer(each.text, add_special_tokens=False)["input_ids"]
            rows[each.index]["teacher"] = [*ids, end] if each.finish_reason == "stop" else ids[:LONGEST]
    batches = [{"input_ids": torch.tensor([row["prompt"] + row["data"]])} for row in rows[:8]]
    batches = [each | {"attention_mask": torch.ones_like(each["input_ids"])} for each in batches]
    layers = top_layers(block_influence(model, batches), NUM_LAYERS)
    held_out = rows[ANSWERED : ANSWERED + HELD_OUT]
    rows = rows[:ANSWERED] + rows[ANSWERED + HELD_OUT :]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(
        file, {"layers": layers, "rows": rows, "held_out": held_out, "teacher_accuracy": accuracy(model, held_out)}
    )


def example(prompt: list[int], answer: list[int]) -> dict[str, list[int]]:
    """Return a row whose target tokens are those of the answer."""
    return {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}


def steps(rows: list[dict], texts: tuple[str, ...], seed: int) -> list[dict[str, Any]]:
    """Return the rows of each step, with `TARGETS` target tokens in each."""
    order = [*rows]
    random.Random(seed).shuffle(order)
    answers = {text: cycle([(row["prompt"], row[text]) for row in order if text in row]) for text in texts}
    result = []
    for number in range(STEPS):
        group, missing = [], TARGETS
        while missing:
            prompt, answer = next(answers[texts[number % len(texts)]])
            group.append(example(prompt, answer[:missing]))
            missing -= len(answer[:missing])
        result.append({"group": group})
    return result


def collate(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Pad rows, or the groups of rows of steps, on the right."""
    rows = [*chain.from_iterable(item.get("group", [item]) for item in items)]
    pads = {"input_ids": 0, "labels": IGNORE_INDEX}
    batch = {
        name: pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=pad)
        for name, pad in pads.items()
    }
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch


@torch.no_grad()
def accuracy(model: Any, rows: list[dict]) -> float:
    """Return the share of questions whose answer in the data is more probable, per token, than answers to others."""
    correct = 0
    for number, row in enumerate(rows):
        others = [rows[(number + 7 * i) % len(rows)]["data"] for i in range(CHOICES)]
        batch = collate([example(row["prompt"], answer) for answer in others])
        labels = batch.pop("labels")[:, 1:]
        log_probs = torch.log_softmax(model(**batch).logits[:, :-1].float(), -1)
        values = log_probs.gather(2, labels.clamp(min=0)[..., None])[..., 0] * (labels != IGNORE_INDEX)
        correct += int((values.sum(1) / (labels != IGNORE_INDEX).sum(1)).argmax() == 0)
    return correct / len(rows)


def measure(model: Any, teacher: Any, rows: list[dict]) -> dict[str, float]:
    """Return perplexity, and KL to the teacher, on the answers of the data and of the teacher; and the accuracy."""
    results = {"accuracy": accuracy(model.eval(), rows)}
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(folder, temperature=1.0, **OPTIONS | {"per_device_eval_batch_size": 8})
        args.remove_unused_columns = False
        trainer = DistillTrainer(model, args, teacher=teacher, data_collator=collate, eval_dataset=rows)
        for text in ("data", "teacher"):
            metrics = held_out_metrics(trainer.evaluate([example(row["prompt"], row[text]) for row in rows]))
            results |= {f"{text}_{key}": metrics[key] for key in ("perplexity", "kl", "teacher_perplexity")}
    return results


def run(name: str, seed: int) -> dict[str, float]:
    """Train the student of an arm, and measure it; `before` is the student that all of them start from."""
    data = read_json(FILE)
    teacher, _ = load()
    model: Any = cut_student(teacher, data["layers"])
    extra = {"teacher_accuracy": data["teacher_accuracy"]}
    if name != "before":
        arm = ARMS[name]
        set_seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            args = DistillConfig(
                folder, alpha=float(arm.is_soft), temperature=1.0, max_steps=STEPS, learning_rate=RATE, warmup_steps=3,
                per_device_train_batch_size=1, seed=seed, **OPTIONS,
            )  # fmt: skip
            args.remove_unused_columns = False
            of_arm = steps(data["rows"], arm.texts, seed)
            DistillTrainer(model, args, teacher=teacher, data_collator=collate, train_dataset=of_arm).train()
        extra["tokens"] = STEPS * TARGETS
    return measure(model, teacher, data["held_out"]) | extra


if __name__ == "__main__":
    if sys.argv[1] == "prepare":
        prepare()
    else:
        print(json.dumps(run(sys.argv[1], int(sys.argv[2]))))
