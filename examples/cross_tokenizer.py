"""Distill a teacher whose tokenizer is not that of the student.

For: the best teacher for a task is of another model family than the student.
Needs: one GPU with 24 GB for the default models (an estimate), and `pip install ".[trl]"`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/cross_tokenizer.py --teacher Qwen/Qwen2.5-1.5B-Instruct --output_dir runs/cross-tokenizer

Each model reads conversations in its own chat template and its own tokens; the loss compares the spans of text at whose
ends both tokenizers have a boundary. The data set has `messages`, or `prompt` and `completion`, or `text`.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.data import Collator, OtherTokenizer, load_examples, split_held_out, tokenize_dataset
from hf_distill.teachers import CrossTokenizerTeacher

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-1.5B-Instruct")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--loss", choices=("projected_kl", "alm", "uld"), default="projected_kl")
parser.add_argument("--output_dir", default="runs/cross-tokenizer")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_length", type=int, default=1024)
parser.add_argument("--learning_rate", type=float, default=2e-5)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
tokenizer = AutoTokenizer.from_pretrained(arguments.student)
teacher_tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16 if has_gpu else torch.float32)

others = [OtherTokenizer(teacher_tokenizer)]
train_rows, eval_rows = (
    tokenize_dataset(examples, tokenizer, arguments.max_length, other_tokenizers=others)
    for examples in split_held_out(load_examples(arguments.dataset), arguments.held_out_share, seed=0)
)

trainer = DistillTrainer(
    model=student,
    teacher=CrossTokenizerTeacher(teacher, processing_class=teacher_tokenizer),
    args=DistillConfig(
        arguments.output_dir,
        cross_tokenizer=arguments.loss,
        alpha=0.5,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        bf16=has_gpu,
        logging_steps=10,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    data_collator=Collator(tokenizer.pad_token_id),
    train_dataset=train_rows,
    eval_dataset=eval_rows,
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
for name in ("eval_bits_per_byte", "eval_teacher_bits_per_byte", "eval_chunk_kl"):  # comparable across tokenizers
    if name in after:
        print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)
