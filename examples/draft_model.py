"""Train a draft model for speculative decoding: a student of two of the teacher's layers.

For: faster decoding of a large model without a change of its output.
Needs: one GPU that holds the teacher, and `pip install ".[trl]"`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/draft_model.py --teacher Qwen/Qwen2.5-7B-Instruct --output_dir runs/draft

Drafted tokens are compared with the teacher's distribution, on which the student is trained (alpha 1, temperature 1).
A useful draft model needs millions of tokens, best of text that the teacher wrote (examples/sequence_level.py).
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import DistillConfig, DistillTrainer, cut_student
from hf_distill.analysis import ModelPair, measure_drafts
from hf_distill.data import Collator, load_examples, split_held_out, tokenize_dataset

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--teacher", default="Qwen/Qwen2.5-7B-Instruct")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--output_dir", default="runs/draft")
parser.add_argument("--max_steps", type=int, default=5000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_length", type=int, default=1024)
parser.add_argument("--prompts", type=int, default=8, help="held-out rows whose first halves the teacher continues")
parser.add_argument("--max_new_tokens", type=int, default=64)
parser.add_argument("--learning_rate", type=float, default=2e-4)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

has_gpu = torch.cuda.is_available()
tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
teacher = AutoModelForCausalLM.from_pretrained(arguments.teacher, dtype=torch.bfloat16 if has_gpu else torch.float32)
layers = [0, teacher.config.num_hidden_layers - 1]
train_rows, eval_rows = (
    tokenize_dataset(examples, tokenizer, arguments.max_length)
    for examples in split_held_out(load_examples(arguments.dataset), arguments.held_out_share, seed=0)
)
trainer = DistillTrainer(
    model=cut_student(teacher, layers).float(),
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
print(f"eval_kl: {before['eval_kl']:.4f} before training, {after['eval_kl']:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)

untrained = cut_student(teacher, layers).to(teacher.device).eval()
trained = AutoModelForCausalLM.from_pretrained(arguments.output_dir, dtype=teacher.dtype).to(teacher.device)
measured = measure_drafts(
    ModelPair(teacher, None, eval_rows, Collator(tokenizer.pad_token_id), device=teacher.device),
    {"before training": lambda: untrained, "after training": lambda: trained},
    prompts=[ids[: len(ids) // 2] for ids in eval_rows[: arguments.prompts]["input_ids"]],
    new_tokens=arguments.max_new_tokens,
)
for name, score in measured.drafts.items():  # decoding is greedy
    accepted = f"{score.accepted_tokens:.2f} of {measured.drafted_tokens} drafted tokens accepted"
    print(f"{name}: {accepted}, acceptance rate {score.acceptance_rate:.1%}, {score.speedup:.2f} times as fast")
