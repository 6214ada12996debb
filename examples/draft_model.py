"""Train a draft model for speculative decoding: a student of two of the teacher's layers.

For: faster decoding of a large model without a change of its output.
Needs: one GPU that holds the teacher, and `pip install ".[trl]"`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/draft_model.py --teacher Qwen/Qwen2.5-7B-Instruct --output_dir runs/draft

The student is trained on the teacher's distribution alone (alpha 1, temperature 1), with which drafted tokens are
compared. A useful draft model needs millions of tokens, best of text that the teacher wrote (docs/sequence-level.md).
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillConfig, DistillTrainer, cut_student
from hf_distill.data import Collator, load_examples, split_held_out, tokenize_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--prompt", default="Why is the sky blue?")
parser.add_argument("--output_dir", default="runs/draft")
parser.add_argument("--max_steps", type=int, default=5000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_length", type=int, default=1024)
parser.add_argument("--max_new_tokens", type=int, default=128)
parser.add_argument("--learning_rate", type=float, default=2e-4)
parser.add_argument("--held_out_share", type=float, default=0.01)
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16 if has_gpu else torch.float32)
student = cut_student(teacher, layers=[0, teacher.config.num_hidden_layers - 1]).float()
train_rows, eval_rows = (
    tokenize_dataset(examples, tokenizer, arguments.max_length)
    for examples in split_held_out(load_examples(arguments.dataset), arguments.held_out_share, seed=0)
)

trainer = DistillTrainer(
    model=student,
    teacher=teacher,
    args=DistillConfig(
        arguments.output_dir,
        temperature=1.0,
        alpha=1.0,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        bf16=has_gpu,
        logging_steps=10,
        report_to="none",
    ),
    data_collator=Collator(tokenizer.pad_token_id),
    train_dataset=train_rows,
    eval_dataset=eval_rows,
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
for name in ("eval_kl", "eval_agreement"):  # agreement: share of tokens that greedy decoding accepts on this text
    print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)

draft = AutoModelForCausalLM.from_pretrained(arguments.output_dir, dtype=teacher.dtype).to(teacher.device).eval()
teacher_forwards = 0


def count_forward(module, positional, keywords):
    """Count the forwards of the teacher."""
    global teacher_forwards
    teacher_forwards += 1


hook = teacher.register_forward_pre_hook(count_forward, with_kwargs=True)
inputs = tokenizer(arguments.prompt, return_tensors="pt", return_token_type_ids=False).to(teacher.device)
output = teacher.generate(
    **inputs, assistant_model=draft, do_sample=False, max_new_tokens=arguments.max_new_tokens, use_cache=True
)
hook.remove()
new_tokens = output.shape[1] - inputs["input_ids"].shape[1]
per_forward = new_tokens / teacher_forwards
print(f"{new_tokens} tokens in {teacher_forwards} forwards of the teacher: {per_forward:.2f} per forward")
print(tokenizer.decode(output[0], skip_special_tokens=True))
