"""Train a small language model with `DistillTrainer` on a device, and print one line of JSON; `gpu.py` runs this.

python benchmarks/gpu_trainer.py bf16|fp32_teacher|second_card|compile|fsdp2 cuda|cpu
"""

import json
import sys
import tempfile
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from hf_distill import DistillConfig, DistillTrainer

STEPS, WARMUP_STEPS = 20, 5
SIZES = {
    "cuda": {"hidden_size": 1024, "num_hidden_layers": 8, "vocab_size": 32000, "rows": 8, "length": 1024},
    "cpu": {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 320, "rows": 2, "length": 32},
}


class Clock(TrainerCallback):
    """Time the steps after the first ones."""

    def on_step_end(self, args, state, control, **kwargs):
        """Start at the last step that is not counted, and stop at the last step."""
        if state.global_step in (WARMUP_STEPS, STEPS):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step == WARMUP_STEPS:
                self.start = time.perf_counter()
            else:
                self.seconds = (time.perf_counter() - self.start) / (STEPS - WARMUP_STEPS)


def build(size: dict, layers: int, seed: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Make a model with random weights."""
    torch.manual_seed(seed)
    width = size["hidden_size"]
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16 if width < 128 else width // 64,
        vocab_size=size["vocab_size"],
        max_position_embeddings=size["length"],
    )
    return LlamaForCausalLM(config).to(dtype)


def main() -> None:
    """Train 20 steps of one variant."""
    variant, device = sys.argv[1:3]
    size = SIZES[device]
    teacher_dtype = torch.float32 if variant == "fp32_teacher" else torch.bfloat16
    student = build(size, size["num_hidden_layers"] // 2, 0, torch.float32)
    teacher = build(size, size["num_hidden_layers"], 1, teacher_dtype)
    if variant == "second_card":
        teacher.to("cuda:1")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, size["vocab_size"], (64, size["length"]), generator=generator)
    options: dict = {"compile": {"torch_compile": True, "compile_teacher": True}}.get(variant, {})
    if variant == "fsdp2":
        options = {
            "fsdp": "full_shard",
            "fsdp_config": {"fsdp_version": 2, "transformer_layer_cls_to_wrap": "LlamaDecoderLayer"},
        }
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder,
            bf16=True,
            max_steps=STEPS,
            per_device_train_batch_size=size["rows"],
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device == "cpu",
            learning_rate=1e-3,
            **options,
        )
        trainer = DistillTrainer(
            student,
            args,
            teacher=teacher,
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[clock],
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "seconds_per_step": clock.seconds,
        "losses": [float(loss) for loss in losses],
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
