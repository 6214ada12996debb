"""Distill a 70B teacher that is sharded over 8 GPUs (FSDP2) into a student of 8B with LoRA (DDP).

For: a teacher that does not fit on one GPU, on one machine with several.
Needs: 8 GPUs with 80 GB (`hf-distill plan` estimates other sizes), and `pip install ".[trl,peft]"`.
Run with tiny models in two processes on CPUs (gloo) by the test suite; not run on GPUs or with the default models.

    torchrun --nproc_per_node 8 examples/teacher_70b_fsdp2.py --dataset HuggingFaceTB/smol-smoltalk

With --teacher_placement zero3 the teacher is sharded by DeepSpeed ZeRO-3 (`pip install ".[deepspeed]"`); with nf4 each
GPU holds the full teacher in 4 bits (`pip install ".[quant]"`). The default models need a Hub account that accepted
their license, and `hf auth login`.
"""

import argparse

import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.data import load_examples, split_held_out
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="meta-llama/Llama-3.1-8B-Instruct")
parser.add_argument("--teacher", default="meta-llama/Llama-3.1-70B-Instruct")
parser.add_argument("--teacher_placement", choices=("fsdp2", "zero3", "nf4"), default="fsdp2")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--output_dir", default="runs/teacher-70b")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--batch_size", type=int, default=2, help="rows of each GPU")
parser.add_argument("--max_length", type=int, default=2048)
parser.add_argument("--learning_rate", type=float, default=1e-4)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
dtype = "bfloat16" if has_gpu else "float32"
tokenizer = AutoTokenizer.from_pretrained(arguments.student)
train_rows, eval_rows = split_held_out(load_examples(arguments.dataset), arguments.held_out_share, seed=0)
quantization = {"quantization": "nf4"} if arguments.teacher_placement == "nf4" else {}

trainer = DistillSFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(arguments.student, dtype=dtype),
    teacher=arguments.teacher,  # each process reads its shard only
    args=DistillSFTConfig(
        arguments.output_dir,
        teacher_fsdp=arguments.teacher_placement == "fsdp2",
        teacher_deepspeed="zero3-teacher.json" if arguments.teacher_placement == "zero3" else None,  # packaged
        teacher_init_kwargs={"dtype": dtype, **quantization},
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        bf16=has_gpu,
        use_cpu=not has_gpu,
        logging_steps=10,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    peft_config=LoraConfig(r=64, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM"),
    train_dataset=train_rows,
    eval_dataset=eval_rows,
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
if trainer.is_world_process_zero():
    for name in ("eval_kl", "eval_agreement", "eval_perplexity"):
        print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)
