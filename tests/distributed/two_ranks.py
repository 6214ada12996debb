"""Trains a tiny student for a few steps on all ranks; rank 0 writes the results.

python two_ranks.py FOLDER [features] [ema|mutual|frozen|multi_view|mtp] [resume] [zero1|zero2|zero3|fsdp2]
    [teacher=zero3|fsdp2] [compile] [other_tokenizer] [row_values] [quantized] [die|hang|nonfinite]

ema, mutual, frozen, multi_view and mtp choose a non-frozen teacher. zero1 to fsdp2 choose the strategy of the student,
`teacher=` that of the teacher. compile compiles the blocks of both models, with activation checkpointing.
other_tokenizer gives the teacher another tokenizer, row_values gives the rows weights and authors, and quantized
quantizes the student. In the second step, die ends rank 1, hang stops it, and nonfinite makes its loss infinite.
Models are read from FOLDER/../models.
"""

import json
import math
import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import collate, rows
from torch import nn
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.distributed import DistributedConfig

from hf_distill import DistillConfig, DistillTrainer, QuantizationScheme, prepare_quantized_student
from hf_distill.core.deepspeed_config import read_deepspeed
from hf_distill.data.collator import Collator
from hf_distill.teachers import EMATeacher, MTPTeacher, MultiViewTeacher, PeerTeacher, Teacher
from hf_distill.trainer.packed_batches import PackedAttentionCheck

folder, variants, global_batch = Path(sys.argv[1]), sys.argv[2:], 8
models = folder.parent / "models"
world = int(os.environ.get("WORLD_SIZE", 1))
HAS_OTHER_TOKENIZER = "other_tokenizer" in variants
STUDENT, TEACHER_MODEL = ("student-groups", "teacher-digits") if HAS_OTHER_TOKENIZER else ("student", "teacher")
ZERO = next((v for v in variants if v.startswith("zero")), None)
TEACHER = next((v.removeprefix("teacher=") for v in variants if v.startswith("teacher=")), None)
TEACHER_KIND = next((v for v in variants if v in ("ema", "mutual", "frozen", "multi_view", "mtp")), None)
BY_ORIGIN = {
    "teacher": {"divergence": {"name": "skew_kl", "lam": 0.1}, "alpha": 0.9},
    "student": {"divergence": "reverse_kl", "alpha": 1.0},
}
FEATURES = [
    {"name": "hidden_mse", "weight": 0.1},
    {"name": "hidden_cosine", "layers": "learned"},
    {"name": "attention_kl", "layers": "last:1"},
    {"name": "value_relation", "layers": "last:1"},
]


def local_parameter_share(model: nn.Module) -> float:
    """Return the share of a model's parameters that this rank has in memory between two steps."""
    num_local = num_parameters = 0
    for p in model.parameters():
        local = p.to_local() if hasattr(p, "to_local") else p
        num_local += max(local.numel(), p.ds_tensor.numel() if hasattr(p, "ds_tensor") else 0)
        num_parameters += p.ds_numel if hasattr(p, "ds_numel") else p.numel()
    return num_local / num_parameters


def student_config() -> dict[str, Any]:
    """Return the packaged config, without the key that the trainer adds."""
    config = read_deepspeed(f"{ZERO}-student.json")
    config["zero_optimization"].pop("stage3_gather_16bit_weights_on_model_save", None)
    return config


load = partial(AutoModelForCausalLM.from_pretrained, attn_implementation="eager")


class RankFault(TrainerCallback):
    """Ends or hangs rank 1 in the second step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if args.process_index == 1 and state.global_step == 1:
            if "die" in variants:
                os._exit(13)
            if "hang" in variants:
                time.sleep(600)


class TrainerWithInfiniteLoss(DistillTrainer):
    """The loss of rank 1 in the second step is infinite, but its gradient is not."""

    def compute_loss(self, *args, **options):
        loss = super().compute_loss(*args, **options)
        is_affected = self.args.process_index == 1 and self.state.global_step == 1 and torch.is_grad_enabled()
        return loss + math.inf if is_affected else loss


def make_teacher(model: nn.Module) -> Teacher:
    """Return the non-frozen teacher; "frozen" is a mutual peer that is frozen after half of the training."""
    if TEACHER_KIND == "ema":
        return EMATeacher(decay=0.5)
    if TEACHER_KIND == "multi_view":
        tokenizer = SimpleNamespace(mask_token_id=5)
        return MultiViewTeacher({"token_dropout": 0.3, "span_deletion": 0.2}, processing_class=tokenizer)
    options = {"freeze_at_progress": 0.5} if TEACHER_KIND == "frozen" else {"learning_rate": 3e-3}
    return MTPTeacher(num_future_tokens=2) if TEACHER_KIND == "mtp" else PeerTeacher(model, mutual=True, **options)


def text_rows(tokenizer: Any, count: int) -> list[dict[str, torch.Tensor]]:
    """Return rows of texts of different lengths, with numbers that the two tokenizers divide differently."""
    texts = [f"x = [{i}, {i * 123456}]" + " # naïve café" * (i % 3) for i in range(count)]
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]
    return [{"input_ids": each, "labels": each} for each in ids]


def run(name: str, resume: str | None) -> tuple[DistillTrainer, dict]:
    """Train and evaluate; return the trainer and its results."""
    if "hang" in variants:  # transformers applies ddp_timeout on GPUs only
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=10))
    args = DistillConfig(
        str(folder / name),
        max_steps=10,
        per_device_train_batch_size=global_batch // world // 2,
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=2,
        logging_steps=1,
        save_strategy="steps" if ("features" in variants or TEACHER_KIND) and "fsdp2" not in variants else "no",
        save_steps=5,
        learning_rate=1e-2 if TEACHER_KIND else 1e-3,
        max_grad_norm=1e3 if TEACHER_KIND else 1.0,  # high, because DeepSpeed clips both models together
        alpha=0.0 if TEACHER_KIND == "mtp" else 0.5,
        by_origin=BY_ORIGIN if "row_values" in variants else None,
        cross_tokenizer="alm" if HAS_OTHER_TOKENIZER else None,
        use_cpu=True,
        dataloader_pin_memory=False,
        train_sampling_strategy="sequential",
        losses=FEATURES if "features" in variants else None,
        projectors={"learning_rate": 1e-2} if "features" in variants else None,
        deepspeed=student_config() if ZERO else None,
        teacher_init_kwargs={"attn_implementation": "eager"} if TEACHER in ("zero3", "fsdp2") else None,
        teacher_deepspeed="zero3-teacher.json" if TEACHER == "zero3" else None,
        teacher_fsdp=TEACHER == "fsdp2",
        torch_compile_backend="eager" if "compile" in variants else None,
        compile_teacher="compile" in variants,
        activation_checkpointing="compile" in variants,
    )
    teacher: Any = str(models / TEACHER_MODEL)
    if TEACHER not in ("zero3", "fsdp2"):
        teacher = load(teacher)  # sharded under ZeRO-3, because the student's config is active
    if "fsdp2" in variants:
        student = load(models / STUDENT, distributed_config=DistributedConfig(fsdp_size=world))
    else:
        student = load(models / STUDENT)
    if "quantized" in variants:
        prepare_quantized_student(student, QuantizationScheme("int4_weight_only", group_size=16))
    if TEACHER_KIND:
        teacher = make_teacher(teacher)
    data: dict[str, Any] = {"train_dataset": rows("llama", 32), "eval_dataset": rows("llama", 7, seed=5)}
    data["data_collator"] = collate
    if HAS_OTHER_TOKENIZER:
        tokenizer = AutoTokenizer.from_pretrained(models / STUDENT)
        data = {"train_dataset": text_rows(tokenizer, 32), "eval_dataset": text_rows(tokenizer, 7)}
        data |= {"processing_class": tokenizer, "data_collator": Collator(0)}
    if "row_values" in variants:
        values = [{"weight": torch.tensor(i % 4 / 2), "origin": torch.tensor(i % 3)} for i in range(32)]
        data["train_dataset"] = [row | more for row, more in zip(data["train_dataset"], values, strict=True)]
    trainer = (TrainerWithInfiniteLoss if "nonfinite" in variants else DistillTrainer)(
        student,
        args,
        teacher=teacher,
        **data,
        callbacks=[RankFault()],
    )
    trainer.add_callback(PackedAttentionCheck(trainer))  # runs the sharded models on every rank
    trainer.train(resume_from_checkpoint=resume)
    teacher_share = local_parameter_share(trainer.teacher.model)
    metrics = trainer.evaluate()
    trainer.save_model(str(folder / f"{name}-saved"))
    logs = [log for log in trainer.state.log_history if "loss" in log]
    keys = [k for k in logs[0] if k.endswith("loss") or k in ("grad_norm", "teacher_weight_drift") or "_origin_" in k]
    if TEACHER_KIND in ("mutual", "frozen"):
        keys.remove("grad_norm")  # it is the student's alone, but with DeepSpeed that of both models
    return trainer, {
        "world": trainer.accelerator.num_processes,
        "teacher_share": teacher_share,
        "graphs": counters["frames"]["ok"],
        "graph_breaks": counters["graph_break"].total(),
        "log": [{k: float(log[k]) for k in keys if k in log} for log in logs],
        "skipped": [log["step"] for log in logs if log.get("skipped_steps")],
        "metrics": {k: v for k, v in metrics.items() if "per_second" not in k and "time" not in k},
    }


if __name__ == "__main__":
    name = "resumed" if "resume" in variants else "straight"
    trainer, results = run(name, str(folder / "straight" / "checkpoint-5") if "resume" in variants else None)
    if trainer.is_world_process_zero():
        (folder / f"{name}.json").write_text(json.dumps(results))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
