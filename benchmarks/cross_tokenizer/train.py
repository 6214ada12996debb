"""Train one student of the cross-tokenizer experiments, and print its figures as JSON.

    python train.py ARM SEED [STEPS]

With STEPS, the teacher runs in each step and only time and memory are measured, over the steps after the first two.
"""

import ctypes
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from bits_per_byte import common_starts, held_out_bits
from datasets import Dataset
from models import TEACHERS, WORK, model_path
from remembered import RememberedStates
from rows import KINDS, prepare_rows, read_rows, training_rows
from tokenizers import Tokenizer
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.data.collator import Collator
from hf_distill.models.pruning import block_influence, cut_student, top_layers

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import status_mib

STEPS, BATCH, NUM_LAYERS, WARM = 40, 2, 15, 2
LEARNING_RATE = 8.0e-4  # the one that hard labels do best with in evidence/
TEXTS = WORK / "texts"


@dataclass(frozen=True)
class Arm:
    """A way to train the student.

    trainer: "hard" (cross entropy on labels), "ours", or "gold" (TRL)
    teacher: "smollm2", a name in `models.TEACHERS`, or "equal": SmolLM2 with another tokenizer of as many tokens, whose
        predictions mean nothing but whose cost equals that of "smollm2"
    options: of the trainer's config
    """

    trainer: str
    teacher: str = ""
    options: dict[str, Any] = field(default_factory=dict)


# The example of TRL's documentation, and what its configuration reference offers in place of its defaults.
_GOLD = {
    "use_uld_loss": True,
    "uld_use_hybrid_loss": True,
    "uld_hybrid_matched_weight": 0.6,
    "uld_hybrid_unmatched_weight": 0.4,
}
_BAYESIAN = _GOLD | {"uld_token_merge_strategy": "bayesian"}
_QWEN, _GEMMA = TEACHERS
_AT_1, _PROJECTED = {"temperature": 1.0}, {"cross_tokenizer": "projected_kl"}
LOSSES = ("alm", "projected_kl", "uld")
ARMS = {
    "hard": Arm("hard"),
    "smollm2": Arm("ours", "smollm2"),
    **{f"qwen_{loss}": Arm("ours", _QWEN, _AT_1 | {"cross_tokenizer": loss}) for loss in LOSSES},
    **{f"gemma_{loss}": Arm("ours", _GEMMA, _AT_1 | {"cross_tokenizer": loss}) for loss in LOSSES},
    **{
        f"qwen_projected_kl_alpha_{alpha}": Arm("ours", _QWEN, _AT_1 | _PROJECTED | {"alpha": alpha})
        for alpha in (0.3, 0.8)
    },
    "qwen_projected_kl_temperature_2": Arm("ours", _QWEN, _PROJECTED | {"temperature": 2.0}),
    **{f"equal_{loss}": Arm("ours", "equal", {"cross_tokenizer": loss}) for loss in LOSSES},
    "gold": Arm("gold", _QWEN, _GOLD),
    "gold_bayesian": Arm("gold", _QWEN, _BAYESIAN),
    "gold_bayesian_hard": Arm(
        "gold", _QWEN, _BAYESIAN | {"uld_crossentropy_weight": 0.5, "uld_distillation_weight": 0.5}
    ),
}


class Meter(TrainerCallback):
    """Measures seconds of a step, tokens that the student reads in a second, and the peak of resident memory.

    CPU seconds do not depend on other processes of the machine.
    """

    def __init__(self, student: torch.nn.Module, warm: int):
        self.tokens, self.warm = 0, warm
        student.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, _args: Any, kwargs: dict) -> None:
        if module.training:
            mask = kwargs.get("attention_mask")
            self.tokens += kwargs["input_ids"].numel() if mask is None else int(mask.sum())

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.warm:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.resident, self.before = status_mib("VmRSS"), self.tokens
            self.start, self.cpu_start = time.perf_counter(), time.process_time()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps, seconds = state.global_step - self.warm, time.perf_counter() - self.start
        self.figures = {
            "seconds_per_step": seconds / steps,
            "cpu_seconds_per_step": (time.process_time() - self.cpu_start) / steps,
            "tokens_per_second": (self.tokens - self.before) / seconds,
            "peak_mib": status_mib("VmHWM"),
            "peak_over_resident_mib": status_mib("VmHWM") - self.resident,
        }


def load(name: str) -> tuple[PreTrainedModel, Any]:
    """Return a model in float32 and its tokenizer."""
    if name == "equal":
        model, tokenizer = load("smollm2")
        return model, first_tokens(AutoTokenizer.from_pretrained(model_path(_QWEN)), len(tokenizer))
    path = model_path(name)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(path)


def first_tokens(tokenizer: Any, count: int) -> Any:
    """Return a byte-level BPE tokenizer of `count` tokens: the first ones of another, and its first special token."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    vocab = {token: number for token, number in spec["model"]["vocab"].items() if number < count - 1}
    merges = [pair for pair in spec["model"]["merges"] if "".join(pair) in vocab]
    spec["model"] |= {"vocab": vocab, "merges": [pair for pair in merges if set(pair) <= set(vocab)]}
    spec["added_tokens"] = [spec["added_tokens"][0] | {"id": count - 1}]
    spec["post_processor"] = None
    end = spec["added_tokens"][0]["content"]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), eos_token=end, pad_token=end)


def student_path() -> Path:
    """Return the folder of the student at the start, which is cut from SmolLM2 if it does not exist."""
    folder = WORK / "student"
    if not folder.is_dir():
        model, tokenizer = load("smollm2")
        prepare_rows(TEXTS, tokenizer, STEPS * BATCH // len(KINDS))
        batches = [dict(tokenizer(row, return_tensors="pt")) for row in training_rows(TEXTS)[:8]]
        cut_student(model, top_layers(block_influence(model, batches), NUM_LAYERS)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def with_starts(rows: list[str]) -> tuple[list[str], list[int]]:
    """Return texts, and the first character of each that is predicted: the same for every model and trainer."""
    tokenizers = [AutoTokenizer.from_pretrained(model_path(name)) for name in ("smollm2", *TEACHERS)]
    return rows, common_starts(rows, tokenizers)


def shuffled_rows(seed: int) -> list[tuple[str, int]]:
    """Return (text, first target character) of the training rows in the order of a seed, in which all trainers read."""
    rows = list(zip(*with_starts(training_rows(TEXTS)), strict=True))
    return random.Random(seed).sample(rows, len(rows))


def held_out() -> dict[str, tuple[list[str], list[int]]]:
    """Return kind -> (texts, first characters that are predicted)."""
    return {kind: with_starts(read_rows(TEXTS, f"held_out_{kind}")) for kind in KINDS}


def labelled(row: tuple[str, int], tokenizer: Any) -> dict[str, list[int]]:
    """Return `input_ids`, and `labels` from the first target character on."""
    text, start = row
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    labels = [
        each if begin >= start else -100 for each, (begin, _) in zip(ids, encoding["offset_mapping"], strict=True)
    ]
    return {"input_ids": ids, "labels": labels}


def arguments(folder: str, seed: int, steps: int) -> dict[str, Any]:
    """Return the training arguments that all arms share."""
    return {
        "output_dir": folder, "max_steps": steps, "per_device_train_batch_size": BATCH, "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "cosine", "warmup_steps": 4, "save_strategy": "no", "logging_steps": 10, "seed": seed,
        "report_to": "none", "dataloader_pin_memory": False, "disable_tqdm": True, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip


class _InOrder:
    """Makes a Trainer read its rows in their order."""

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)  # type: ignore[attr-defined]


def make_trainer(arm: Arm, common: dict[str, Any], student: Any, tokenizer: Any, teacher: Any, rows: list) -> Any:
    """Return the trainer of an arm.

    Args:
        arm: the arm.
        common: see `arguments`.
        student: the student.
        tokenizer: the student's.
        teacher: (model, tokenizer), or None.
        rows: see `shuffled_rows`.
    """
    if arm.trainer == "gold":
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        class OrderedGOLDTrainer(_InOrder, GOLDTrainer):
            pass

        path = {"teacher_tokenizer_name_or_path": model_path(arm.teacher)}
        args = GOLDConfig(lmbda=0.0, max_length=256, **path, **common, **arm.options)
        data = Dataset.from_list([{"prompt": text[:start], "completion": text[start:]} for text, start in rows])
        return OrderedGOLDTrainer(student, teacher[0], args, train_dataset=data, processing_class=tokenizer)
    data = Dataset.from_list([labelled(row, tokenizer) for row in rows])
    shared = {"data_collator": Collator(tokenizer.pad_token_id), "processing_class": tokenizer, "train_dataset": data}

    if arm.trainer == "hard":

        class OrderedTrainer(_InOrder, Trainer):
            pass

        return OrderedTrainer(student, TrainingArguments(**common), **shared)

    class OrderedDistillTrainer(_InOrder, DistillTrainer):
        pass

    args = DistillConfig(**common, **arm.options)
    return OrderedDistillTrainer(student, args, teacher=our_teacher(arm, teacher), **shared)


def our_teacher(arm: Arm, teacher: tuple[PreTrainedModel, Any]) -> Any:
    """Return the `teacher` argument of DistillTrainer."""
    from hf_distill.teachers import FrozenTeacher

    return FrozenTeacher(teacher[0], processing_class=teacher[1])


def main(name: str, seed: int, live_steps: int | None) -> dict[str, Any]:
    """Train one arm; return bits per byte on each kind of text, or with live_steps its time and memory."""
    arm, start = ARMS[name], student_path()
    student = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(start)
    teacher = load(arm.teacher) if arm.teacher else None
    states = None
    if teacher and not live_steps:
        states = RememberedStates(teacher[0], WORK / f"states-{arm.teacher}.pt")
    with tempfile.TemporaryDirectory() as folder:
        common = arguments(folder, seed, live_steps or STEPS)
        trainer = make_trainer(arm, common, student, tokenizer, teacher, shuffled_rows(seed))
        meter = Meter(student, WARM)
        trainer.add_callback(meter)
        trainer.train()
        losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    figures: dict[str, Any] = {"arm": name, "seed": seed, "steps": trainer.state.global_step, **meter.figures}
    if live_steps:
        return figures
    if states:
        states.save()
    return figures | {"losses": losses, "bits_per_byte": held_out_bits(trainer.model, tokenizer, held_out())}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else None)))
