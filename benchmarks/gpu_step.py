"""Measure training steps on a GPU at the size of real models, beside other ways to distil with a Trainer.

The models have random weights and the shapes of Llama-3.1-8B (teacher, bf16) and Llama-3.2-1B (student, float32 under
bf16 autocast); all tokens are targets. Forward KL at T = 1, AdamW, no activation checkpointing.

    python benchmarks/gpu_step.py [--device cpu] [--rounds 1] [--cases NAME ...]

    sft              a `Trainer` without a teacher: the student's share of the step
    ours             `DistillTrainer`
    ours compiled    the same with `torch_compile=True, compile_teacher=True`
    ours nf4         the same with a teacher in 4 bits (bitsandbytes)
    ours lora        the same with LoRA on the student
    dense            a `Trainer` whose `compute_loss` computes the logits of both models and `kl_div`
    gkd              `GKDTrainer` of TRL on the same rows
    on-policy ours   `OnPolicyDistillTrainer`, reverse KL on the student's own completions
    on-policy trl    `DistillationTrainer` of TRL
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import RESULTS, package_versions
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

STEPS, WARM = 9, 3
PROMPT, NEW_TOKENS, PROMPTS = 64, 64, 32  # of the on-policy cases
SHAPES = {
    "cuda": {
        "student": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
        "teacher": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        "heads": (64, 128, 8),
        "vocab": 128256,
        "length": 2048,
        "rows": {"": 2, "large": 8},
    },
    "cpu": {
        "student": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
        "teacher": {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2},
        "heads": (16, 16, 2),
        "vocab": 320,
        "length": 64,
        "rows": {"": 2, "large": 4},
    },
}
CASES = (
    "sft", "ours", "dense", "gkd", "ours compiled", "ours nf4", "ours lora", "sft large", "ours large",
    "on-policy ours", "on-policy trl",
)  # fmt: skip


def build(shape: dict, role: str, device: str) -> LlamaForCausalLM:
    """Make a model with random weights on the device."""
    sizes = shape[role]
    head_dim = shape["heads"][role == "teacher"]
    config = LlamaConfig(
        vocab_size=shape["vocab"],
        num_attention_heads=sizes["hidden_size"] // head_dim,
        num_key_value_heads=min(shape["heads"][2], sizes["hidden_size"] // head_dim),
        max_position_embeddings=4096,
        tie_word_embeddings=role == "student",
        pad_token_id=2,
        **sizes,
    )
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if role == "teacher" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


class Clock(TrainerCallback):
    """Measures the seconds of the steps after the first WARM, and the peak of the device's memory."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (WARM, STEPS):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            now = time.perf_counter()
            self.seconds = now if state.global_step == WARM else (now - self.seconds) / (STEPS - WARM)


class DenseTrainer(Trainer):
    """Logits of all tokens from both models, as guides on distillation with a Trainer show it."""

    teacher: LlamaForCausalLM

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Forward KL of the next tokens."""
        with torch.no_grad():
            teacher_logits = self.teacher(input_ids=inputs["input_ids"]).logits
        logits = model(input_ids=inputs["input_ids"]).logits
        student = F.log_softmax(logits[:, :-1].flatten(0, 1).float(), -1)
        teacher = F.log_softmax(teacher_logits[:, :-1].flatten(0, 1).float(), -1)
        return F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Stack rows of one length; every token is a target."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def trainer(case: str, device: str, folder: str, clock: Clock) -> Trainer:
    """Make the trainer of a case."""
    from datasets import Dataset

    shape = SHAPES[device]
    name, rows = case.removesuffix(" large"), shape["rows"]["large" if case.endswith(" large") else ""]
    if name.startswith("on-policy"):
        return on_policy_trainer(name, device, folder, clock)
    student = build(shape, "student", device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, shape["vocab"], (STEPS * rows, shape["length"]), generator=generator)
    data = Dataset.from_dict({"input_ids": ids.tolist()})
    arguments = dict(
        max_steps=STEPS, per_device_train_batch_size=rows, bf16=True, save_strategy="no", logging_steps=STEPS,
        report_to="none", disable_tqdm=True, use_cpu=device == "cpu", remove_unused_columns=False, learning_rate=1e-5,
        gradient_checkpointing=False,
    )  # fmt: skip
    common: dict = dict(train_dataset=data, data_collator=collate, callbacks=[clock])
    if name == "sft":
        return Trainer(student, TrainingArguments(folder, **arguments), **common)
    if name == "dense":
        dense_trainer = DenseTrainer(student, TrainingArguments(folder, **arguments), **common)
        dense_trainer.teacher = build(shape, "teacher", device).requires_grad_(False).eval()
        return dense_trainer
    if name == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        del arguments["remove_unused_columns"]
        return GKDTrainer(
            student,
            build(shape, "teacher", device),
            GKDConfig(folder, lmbda=0.0, beta=0.0, temperature=1.0, max_length=None, **arguments),
            processing_class=tokenizer(),
            **common,
        )
    from hf_distill import DistillConfig, DistillTrainer

    teacher = build(shape, "teacher", device)
    if name == "ours nf4":
        from transformers import BitsAndBytesConfig

        quantized = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        teacher.save_pretrained(f"{folder}/teacher")
        del teacher
        teacher = AutoModelForCausalLM.from_pretrained(
            f"{folder}/teacher", quantization_config=quantized, dtype=torch.bfloat16, device_map={"": device}
        )
    if name == "ours compiled":
        arguments |= {"torch_compile": True, "compile_teacher": True}
    if name == "ours lora":
        from peft import LoraConfig, get_peft_model

        student = get_peft_model(student, LoraConfig(r=16, target_modules="all-linear"))
    args = DistillConfig(folder, alpha=1.0, temperature=1.0, **arguments)
    return DistillTrainer(student, args, teacher=teacher, **common)


def tokenizer():
    """Make a tokenizer without words, which only pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<s>": 1, "<pad>": 2} | {f"w{i}": i + 3 for i in range(200)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer_of_words = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", pad_token="<pad>"
    )
    tokenizer_of_words.eos_token = "<s>"
    return tokenizer_of_words


def on_policy_trainer(name: str, device: str, folder: str, clock: Clock) -> Trainer:
    """Make a trainer that generates completions of one length in each step."""
    from datasets import Dataset

    shape = SHAPES[device]
    prompts = [" ".join(f"w{(7 * row + i) % 200}" for i in range(PROMPT)) for row in range(STEPS * PROMPTS)]
    arguments = dict(
        max_steps=STEPS, per_device_train_batch_size=PROMPTS, max_completion_length=NEW_TOKENS, bf16=True,
        use_cpu=device == "cpu", report_to="none", save_strategy="no", logging_steps=STEPS, disable_tqdm=True,
        gradient_checkpointing=False, generation_kwargs={"min_new_tokens": NEW_TOKENS}, learning_rate=1e-6,
    )  # fmt: skip
    teacher = build(shape, "teacher", device)
    common: dict = dict(
        model=build(shape, "student", device), train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(), callbacks=[clock],
    )  # fmt: skip
    if name == "on-policy trl":
        from trl import DistillationConfig, DistillationTrainer

        return DistillationTrainer(
            teacher_model=teacher, args=DistillationConfig(folder, beta=1.0, **arguments), **common
        )
    from hf_distill.trl import OnPolicyDistillConfig, OnPolicyDistillTrainer

    return OnPolicyDistillTrainer(teacher=teacher, args=OnPolicyDistillConfig(folder, **arguments), **common)


def one(case: str, device: str) -> dict:
    """Train, and return what was measured."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        run_trainer = trainer(case, device, folder, clock)
        resident = torch.cuda.memory_allocated() if device == "cuda" else 0
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run_trainer.train()
    tokens = (
        PROMPTS * NEW_TOKENS
        if case.startswith("on-policy")
        else run_trainer.args.per_device_train_batch_size * SHAPES[device]["length"]
    )
    logs = [log for log in run_trainer.state.log_history if "loss" in log]
    result = {
        "seconds_per_step": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "loss": logs[-1]["loss"],
        "generation_seconds": logs[-1].get("generation_seconds"),
    }
    if device == "cuda":
        result |= {"models_gib": resident / 2**30, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}
    return result


def main() -> None:
    """Run each case in a process, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=SHAPES)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_step.json")
    parser.add_argument("--one", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one, arguments.device)))
        return
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu (small shapes: a test of the script)"
    results: dict = {"card": card, "versions": package_versions(), "shapes": SHAPES[arguments.device]}
    results["cases"] = {case: [] for case in arguments.cases}
    for _ in range(arguments.rounds):
        for case in arguments.cases:
            command = [sys.executable, __file__, "--device", arguments.device, "--one", case]
            start = time.perf_counter()
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=180)
                last = done.stdout.strip().splitlines()[-1:] or [""]
                ran = done.returncode == 0 and last[0].startswith("{")
                row = json.loads(last[0]) if ran else {"failed": done.stderr[-1500:]}
            except subprocess.TimeoutExpired:
                row = {"failed": traceback.format_exc()[-300:]}
            results["cases"][case].append(row)
            arguments.output.write_text(json.dumps(results, indent=1) + "\n")
            print(f"{case:16} {time.perf_counter() - start:5.0f} s in all", json.dumps(row)[-700:], flush=True)


if __name__ == "__main__":
    main()
