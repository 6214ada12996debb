"""Distill a teacher that vLLM, SGLang or `hf-distill serve` serves: the training process holds the student alone.

For: a teacher that does not fit beside the student, or that runs on another machine.
Needs: one GPU for the student, servers for the teacher, and `pip install ".[trl]"`. Start each server with

    vllm serve Qwen/Qwen2.5-72B-Instruct --tensor-parallel-size 8 --max-logprobs 64 --no-enable-prefix-caching

Run with a tiny model behind a server of vLLM's protocol on a CPU by the test suite; not run with the default models.

    python examples/remote_teacher.py --teacher_url http://teacher-a:8000 http://teacher-b:8000

`hf-distill serve MODEL` is a server too, with --teacher_api hidden: the student gets the teacher's exact distributions,
and the evaluation reports `eval_kl`. vLLM and SGLang return those of the --top_k most probable ids.

The tokenizer of the teacher must be that of the student. The API key of the servers is read from the environment
variable HF_DISTILL_TEACHER_API_KEY. If no server answers, training ends with a checkpoint for --resume.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_distill.data import load_examples, split_held_out
from hf_distill.teachers import RemoteTeacher
from hf_distill.trl import DistillSFTConfig, DistillSFTTrainer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--student", default="Qwen/Qwen2.5-0.5B-Instruct")
parser.add_argument("--teacher_url", nargs="+", default=["http://127.0.0.1:8000"])
parser.add_argument("--teacher_model", help="id under which the servers serve the teacher; default: the only one")
parser.add_argument("--teacher_api", choices=("vllm", "sglang", "hidden"), default="vllm")
parser.add_argument("--top_k", type=int, default=64, help="not with the API hidden")
parser.add_argument("--dataset", default="HuggingFaceTB/smol-smoltalk")
parser.add_argument("--output_dir", default="runs/remote")
parser.add_argument("--max_steps", type=int, default=1000)
parser.add_argument("--batch_size", type=int, default=8)
parser.add_argument("--max_length", type=int, default=1024)
parser.add_argument("--learning_rate", type=float, default=2e-5)
parser.add_argument("--held_out_share", type=float, default=0.01)
parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --output_dir")
arguments = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(arguments.student)
student = AutoModelForCausalLM.from_pretrained(arguments.student, dtype=torch.float32)
train_rows, eval_rows = split_held_out(load_examples(arguments.dataset), arguments.held_out_share, seed=0)
trainer = DistillSFTTrainer(
    model=student,
    teacher=RemoteTeacher(
        arguments.teacher_url,
        model=arguments.teacher_model,
        api=arguments.teacher_api,
        top_k=None if arguments.teacher_api == "hidden" else arguments.top_k,
    ),
    args=DistillSFTConfig(
        arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        learning_rate=arguments.learning_rate,
        temperature=1.0,  # servers return log-probabilities at temperature 1
        alpha=0.5,
        bf16=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
        logging_steps=10,
        save_total_limit=2,
        stop_on_signal=True,  # Ctrl-C and SIGTERM save a checkpoint for --resume
    ),
    train_dataset=train_rows,
    eval_dataset=eval_rows,
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train(resume_from_checkpoint=trainer.newest_checkpoint() if arguments.resume else None)
after = trainer.evaluate()
if trainer.is_world_process_zero():
    for name in [name for name in ("eval_loss", "eval_kl", "eval_perplexity") if name in after]:
        print(f"{name}: {before[name]:.4f} before training, {after[name]:.4f} after")
trainer.save_model()
trainer.save_metrics("eval", after)
