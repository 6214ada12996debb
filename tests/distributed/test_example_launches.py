"""The examples for several processes: a sharded teacher on two ranks, and the options of the SLURM script."""

import json
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
