"""Distill a larger chat model into a LoRA adapter of a smaller one, on one GPU.

For: a small student that fits on one GPU beside its teacher, fine-tuned with few trained parameters.
Needs: one GPU with 24 GB for the default models in bf16 (an estimate), and `pip install ".[trl,peft]"`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/lora_one_gpu.py --dataset HuggingFaceTB/smol-smoltalk --output_dir runs/lora

The data set is a Hub id or a local file (.jsonl, .parquet, ...) of `messages`, or of `prompt` and `completion`.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.data import load_examples, split_held_out
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-3B-Instruct")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--output_dir", default="runs/lora")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_length", type=int, default=1024)
parser.add_argument("--learning_rate", type=float, default=2e-4)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
tokenizer = AutoTokenizer.from_pretrained(arguments.student)
student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.bfloat16 if has_gpu else torch.float32)
train_rows, eval_rows = split_held_out(load_examples(arguments.dataset), arguments.held_out_share, seed=0)

trainer = DistillSFTTrainer(
    model=student,
    teacher=arguments.teacher,  # loaded on the student's device, and frozen
    args=DistillSFTConfig(
        arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        temperature=2.0,
        alpha=0.5,
        bf16=has_gpu,
        teacher_init_kwargs={"dtype": "bfloat16" if has_gpu else "float32"},
        logging_steps=10,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    train_dataset=train_rows,
    eval_dataset=eval_rows,
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
for name in ("eval_kl", "eval_agreement", "eval_perplexity"):
    print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()  # the adapter and the tokenizer
trainer.save_metrics("eval", after)
