"""Trains and evaluates what an example script passes to its trainer on all ranks; rank 0 writes the results.

python scripts_on_ranks.py FOLDER NAME...
"""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import transformers as tf
from datasets import Dataset
from example_scripts import (
    DISTILLING,
    ENCODER,
    SCRIPTS,
    Situation,
    bert,
    built,
    speech_recognition_ctc,
    split,
    text_pairs,
    tokenizer,
)
from PIL import Image
from torch import Tensor, nn

from hf_distill import DualProcessorCollator

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


class Around(nn.Module):
    """A module around a language model, which returns a tuple."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor]:
        return (self.inner(input_ids=input_ids, attention_mask=attention_mask).logits,)


def any_module() -> Situation:
    """What run_clm passes to its trainer, with modules in place of transformers models."""
    situation = SCRIPTS["clm"]()
    rows = situation.trainer["train_dataset"]
    trainer = situation.trainer | {
        "model_type": "causal_lm",
        "compute_metrics": None,
        "train_dataset": rows.select(
            range(len(rows) - len(rows) % 8)
        ),  # whole steps: each has the same rows on 2 ranks
    }
    return replace(situation, model=lambda *args: Around(situation.model(*args)), trainer=trainer)


def two_image_sizes() -> Situation:
    """A teacher with larger images than the student; one process collates and sends each its rows."""

    def model(seed: int = 0, layers: int = 2) -> tf.PreTrainedModel:
        config = tf.ViTConfig(num_hidden_layers=layers, image_size=32 if seed else 16, patch_size=8, **ENCODER)
        config.num_labels = 3
        return built(tf.ViTForImageClassification, config, seed)

    pixels = np.random.default_rng(0).integers(0, 255, (31, 20, 20, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(each), "label": i % 3} for i, each in enumerate(pixels)]
    collator = DualProcessorCollator(*(tf.ViTImageProcessor(size={"height": n, "width": n}) for n in (16, 32)))
    dispatching = {"accelerator_config": {"dispatch_batches": True}}
    return Situation(model, split(Dataset.from_list(rows)) | {"data_collator": collator}, dispatching)


def sentence_encoder() -> Situation:
    """A BERT without a head, whose pooler the loss does not read, on rows without labels."""
    rows = text_pairs(lambda i: i).remove_columns(["label", "idx", "sentence1", "sentence2"])
    fields = {"losses": [{"name": "embedding_mse", "pooling": "cls"}]}
    data = split(rows) | {"data_collator": tf.DataCollatorWithPadding(tokenizer())}
    return Situation(lambda seed=0, layers=2: bert(tf.BertModel, seed, layers), data, fields)


def run(name: str) -> dict:
    """Train and evaluate; return the logs, the metrics and a sum over the weights."""
    others = {each.__name__: each for each in (any_module, two_image_sizes, speech_recognition_ctc, sentence_encoder)}
    situation = (SCRIPTS | others)[name]()
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
    names = ("loss", "soft_loss", "hard_loss", "grad_norm")
    return {
        "world": trainer.accelerator.num_processes,
        "log": [{k: float(log[k]) for k in names if k in log} for log in logs],
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "time" not in k},
        "weights": weights.tolist(),
    }


if __name__ == "__main__":
    results = {name: run(name) for name in sys.argv[2:]}
    if int(os.environ.get("RANK", 0)) == 0:
        (folder / f"{world}.json").write_text(json.dumps(results))
