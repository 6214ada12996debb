"""The examples for several processes: a sharded teacher on two ranks, and the options of the SLURM script."""

import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
from launching import run_on_ranks
from peft import AutoPeftModelForCausalLM
from servers.teacher_servers import VLLMServer
from tiny import build, conversation
from transformers import AutoModelForCausalLM

from hf_distill.recipe.smoke import byte_tokenizer

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("placement", ["fsdp2", "zero3"])
def test_the_script_with_a_sharded_teacher_trains_on_two_ranks(tmp_path, placement):
    tokenizer = byte_tokenizer()
    for who, seed, layers in (("student", 0, 2), ("teacher", 1, 3)):
        build("llama", seed, layers=layers, vocab=len(tokenizer)).save_pretrained(tmp_path / who)
        tokenizer.save_pretrained(tmp_path / who)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(20)))
    models = ("--student", str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"))
    options = (
        *models,
        "--dataset",
        str(tmp_path / "chats.jsonl"),
        "--output_dir",
        "out",
        "--teacher_placement",
        placement,
    )
    steps = ("--max_steps", "10", "--learning_rate", "1e-2", "--max_length", "128", "--held_out_share", "0.2")
    ended = run_on_ranks(2, str(EXAMPLES / "teacher_70b_fsdp2.py"), *options, *steps, folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    before, after = re.findall(r"eval_kl: (\S+) before training, (\S+) after", ended.stdout)[0]
    assert 0 < float(after) < float(before)
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_kl"] > 0
    AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_script_of_several_machines_trains_on_two_ranks_and_prints_once(tmp_path):
    tokenizer, student = byte_tokenizer(), build("llama", 0, vocab=len(byte_tokenizer()))
    student.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": conversation(i)}) + "\n" for i in range(20)))
    teacher = build("llama", 1, layers=3, vocab=len(tokenizer))
    server = partial(VLLMServer, teacher, tokenizer=tokenizer, context=256)
    with server() as one, server() as two:
        urls = ("--teacher_url", one.url, two.url, "--top_k", "8")
        files = ("--student", "student", "--dataset", "chats.jsonl", "--output_dir", "out")
        steps = ("--max_steps", "10", "--learning_rate", "1e-2", "--max_length", "128", "--held_out_share", "0.2")
        script = str(EXAMPLES / "remote_teacher.py")
        ended = run_on_ranks(2, script, *urls, *files, *steps, "--batch_size", "2", folder=tmp_path)
    assert ended.returncode == 0, ended.stderr[-4000:]
    ((before, after),) = re.findall(r"eval_loss: (\S+) before training, (\S+) after", ended.stdout)
    assert 0 < float(after) < float(before)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_slurm_script_passes_only_options_that_its_script_has():
    script = EXAMPLES / "multi_node.slurm"
    subprocess.run(["bash", "-n", str(script)], check=True)
    _, _, passed = script.read_text().partition("examples/remote_teacher.py \\\n")
    names = set(re.findall(r"^ +(--\w+)", passed, flags=re.M))
    known = set(re.findall(r'add_argument\("(--\w+)"', (EXAMPLES / "remote_teacher.py").read_text()))
    assert names
    assert names <= known


@pytest.mark.parametrize(
    ("training", "code", "requeued"),
    [
        ("mkdir -p $out/checkpoint-1000; exit 143", 0, True),
        ("exit 1", 1, False),
        ("mkdir $out/checkpoint-12", 0, False),
    ],
    ids=["stopped after a checkpoint", "failed", "complete"],
)
def test_the_slurm_script_requeues_a_job_that_stopped_with_a_new_checkpoint(tmp_path, training, code, requeued):
    (tmp_path / "runs" / "multi-node-7" / "checkpoint-900").mkdir(parents=True)  # of the job before it was requeued
    commands = {
        "srun": f'echo "$@" > srun.txt; out=runs/multi-node-7; {training}',
        "scontrol": 'echo "$@" >> scontrol.txt; echo first-node',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    variables = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    variables |= {"TEACHER_URLS": "http://a:1 http://b:2", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ended = subprocess.run(["bash", str(EXAMPLES / "multi_node.slurm")], env=os.environ | variables, cwd=tmp_path)
    assert ended.returncode == code
    started = (tmp_path / "srun.txt").read_text()
    assert "--rdzv_endpoint first-node:29500" in started
    assert "--teacher_url http://a:1 http://b:2 " in started
    assert "--output_dir runs/multi-node-7 " in started
    assert "--resume" in started.split()
    assert ("requeue 7" in (tmp_path / "scontrol.txt").read_text().splitlines()) == requeued
