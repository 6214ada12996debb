"""Sequence-level distillation: a teacher answers prompts, and the student trains on the answers that pass filters.

For: prompts without answers, or whose answers the teacher writes better.
Needs: one GPU that holds both models, and `pip install ".[trl]"`.
Run with tiny models on a CPU by the test suite; not run with the default models.

    python examples/sequence_level.py --dataset prompts.jsonl --output_dir runs/sequence-level

Each row has `messages`, whose last answer is replaced, or a `prompt`. The student learns the answers and the teacher's
distribution. A repeated command generates only the answers that are missing in OUTPUT_DIR/answers.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill import generate_data, load_recipe
from hf_distill.data import load_examples, split_held_out
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--teacher", default="Qwen/Qwen2.5-3B-Instruct", help="with the tokenizer of the student")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--output_dir", default="runs/sequence-level")
parser.add_argument("--max_prompts", type=int, default=2000)
parser.add_argument("--max_new_tokens", type=int, default=512)
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_length", type=int, default=1024, help="tokens of prompt and answer")
parser.add_argument("--learning_rate", type=float, default=2e-5)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

dtype = "bfloat16" if torch.cuda.is_available() else "float32"
recipe = load_recipe(
    {
        "student": {"model": arguments.student},
        "teacher": {"model": arguments.teacher, "dtype": dtype},
        "data": {"task": {"path": arguments.dataset}, "eval": {"holdout": arguments.held_out_share}},
        "train": {"output_dir": arguments.output_dir},
        "generate": {
            **{"chat": True, "temperature": 0.7},  # chat: a text is sent as a user's turn
            "max_prompts": arguments.max_prompts,
            "max_new_tokens": arguments.max_new_tokens,
            "filters": ["repetition", "exact_duplicates", "unfinished"],
        },
    }
)
answers = generate_data(recipe, f"{arguments.output_dir}/answers", resume=True, on_stage=print)
train_rows, eval_rows = split_held_out(load_examples(str(answers.folder)), arguments.held_out_share, seed=0)
trainer = DistillSFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32),
    teacher=arguments.teacher,
    args=DistillSFTConfig(
        arguments.output_dir,
        temperature=1.0,
        alpha=0.5,  # half soft labels, half hard labels: the answers
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        bf16=torch.cuda.is_available(),
        teacher_init_kwargs={"dtype": dtype},
        logging_steps=10,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    train_dataset=train_rows,
    eval_dataset=eval_rows,
    processing_class=AutoTokenizer.from_pretrained(arguments.student),
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
for name in ("eval_kl", "eval_perplexity"):
    print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)
