"""`hf-distill serve` as a process: it starts, answers, and finishes what it accepted when it is stopped."""

import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch
from tiny import build, collate, rows
from torch.testing import assert_close
from transformers import AutoTokenizer

from hf_distill.core.targets import Targets
from hf_distill.runner.model_loading import resolve_model
from hf_distill.teachers import FrozenTeacher, RemoteTeacher
from hf_distill.teachers.remote import wire
from hf_distill.teachers.remote.api import TokenRow

TOKEN = "a-long-random-text"


@pytest.fixture
def folder(tmp_path):
    """A model whose forward of 4096 tokens takes a second, with a tokenizer."""
    path = tmp_path / "big-teacher"
    build("llama", 1, layers=6, width=128, vocab=258).save_pretrained(path)
    AutoTokenizer.from_pretrained(resolve_model("smoke:llama/teacher")).save_pretrained(path)
    return path


@pytest.fixture
def server(folder, monkeypatch):
    """The process and its URL."""
    monkeypatch.setenv("HF_DISTILL_SERVE_TOKEN", TOKEN)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = [sys.executable, "-m", "hf_distill", "serve", str(folder), "--port", "0", "--max-batch-tokens", "32768"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url, printed = None, []
    while url is None and (line := process.stdout.readline()):
        printed.append(line)
        url = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert url is not None, "".join(printed)
    yield process, url[0]
    process.kill()
    process.wait()


def test_a_served_folder_teaches_and_a_signal_lets_accepted_requests_finish(server, folder, monkeypatch):
    process, url = server
    monkeypatch.setenv("HF_DISTILL_TEACHER_API_KEY", TOKEN)
    served, local = RemoteTeacher(url, api="hidden"), FrozenTeacher(str(folder))
    batch, tokenizer = collate(rows("llama", 4)), AutoTokenizer.from_pretrained(folder)
    for each in (served, local):
        each.prepare(build("llama", 0, vocab=258), torch.device("cpu"), tokenizer)
    targets = Targets.from_batch(batch, True)
    with torch.no_grad():
        signals = [each(batch, targets, {}).logits.project() for each in (served, local)]
    assert_close(*signals, atol=1e-4, rtol=1e-4)

    headers = {"Authorization": f"Bearer {TOKEN}"}
    row = TokenRow(tuple(range(64)), (62, 63))
    requested = [row] * 512
    info = served.protocol.info

    def post():
        body = wire.request_body(requested, "float32")
        return httpx2.post(url + wire.HIDDEN_STATES, json=body, headers=headers, timeout=60, trust_env=False)

    with ThreadPoolExecutor(2) as threads:
        answers = [threads.submit(post) for _ in range(2)]
        while True:
            metrics = httpx2.get(url + "/metrics", headers=headers, trust_env=False).text
            computing, waiting = (
                int(re.search(rf"_{name}_rows (\d+)", metrics)[1]) for name in ("computing", "queued")
            )
            if computing and waiting:
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert not any(answer.done() for answer in answers)
        for answer in answers:
            assert len(wire.decode_hidden_states(answer.result().content, requested, "float32", info)) == 512
    assert process.wait(30) == 0
    printed = process.stdout.read()
    assert "Stopping: accepted requests are finished first" in printed
    assert "Answered requests: 3;" in printed
    assert TOKEN not in printed
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(url + "/health", trust_env=False)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["org/model", "train.max_steps=2"], "org/model is a model, and KEY=VALUE"),
        (["org/model", "--quantization", "nf5"], "--quantization"),
        (["./no-such-folder"], "there is no such folder"),
        (["quickstart", "--teacher", "maths"], "no teacher 'maths'"),
        (["org/model", "--host", "0.0.0.0"], "HF_DISTILL_SERVE_TOKEN"),
        (["org/model", "--device-map", "{x}"], "--device-map is no JSON object"),
        (["remote"], "only a frozen model can be served"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_loaded(run_cli, monkeypatch, arguments, text):
    monkeypatch.delenv("HF_DISTILL_SERVE_TOKEN", raising=False)
    ended = run_cli("serve", *arguments, "--port", "0") if "--host" not in arguments else run_cli("serve", *arguments)
    assert ended.returncode == 2
    assert text in " ".join((ended.stdout + ended.stderr).split())


def test_a_missing_extra_is_named(run_cli, monkeypatch):
    monkeypatch.setattr("hf_distill.errors.find_spec", lambda name: None if name == "uvicorn" else True)
    ended = run_cli("serve", "org/model")
    assert ended.returncode == 2
    assert 'pip install "hf-distill[serve]"' in ended.stderr
