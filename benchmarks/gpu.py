"""Measure the fused loss and a training step on a GPU, in about ten minutes, and print a table.

python benchmarks/gpu.py [--output FILE] [--stages correctness products losses ...]

The stages run in this order, and the JSON file is written after each one, so that an interrupted run keeps its results:

    correctness  gradients against float64: divergences, temperatures, vocabularies, dtypes, biases, soft caps, chunks
    products     the lower bound: the four matrix products of the loss, timed alone
    losses       time and peak memory of this package, TRL, both Liger losses, and logits of all tokens at once
    fragmented   the same loss after the allocator held most of the card: same time, bitwise equal gradients
    waits        reads from the device inside the loss, which `torch.cuda.set_sync_debug_mode("error")` refuses
    profile      kernels of one call: how many, which, and the share of time in which the GPU works
    trainer      a small `DistillTrainer`: in bf16, compiled, with FSDP2, with a teacher in float32, and with a teacher
                 on a second card if there is one

Packages that are not installed are recorded as such. The limits of `gpu_report` are checked and printed; a limit that
is not met is a result, not an error. `--device cpu` runs the same code with small shapes, to test this script.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from gpu_losses import PEERS, dense, matrix_products, ours, reference, tensors
from gpu_report import print_table
from measure import RESULTS, package_versions

SHAPE = {"tokens": 8192, "vocab": 131072, "hidden": 4096, "teacher_hidden": 4096}
# Pairs of models whose head is a typical share of a step: 70B -> 8B and 7B -> 0.5B.
SHAPES = {
    "8192 x 131072 x 4096": SHAPE,
    "70B to 8B": {"tokens": 8192, "vocab": 128256, "hidden": 4096, "teacher_hidden": 8192},
    "7B to 0.5B": {"tokens": 8192, "vocab": 151936, "hidden": 896, "teacher_hidden": 3584},
}
SMALL = {"tokens": 48, "vocab": 515, "hidden": 32, "teacher_hidden": 48}
DIVERGENCES = ("forward_kl", "reverse_kl", "js", "skew_kl", "skew_reverse_kl", "total_variation")
OBJECTIVES = {
    "KL": {"divergence": "forward_kl", "alpha": 1.0, "temperature": 1.0},
    "KL + CE": {"divergence": "forward_kl", "alpha": 0.5, "temperature": 2.0},
    "JS": {"divergence": "js", "alpha": 1.0, "temperature": 1.0},
    "JS + CE": {"divergence": "js", "alpha": 0.5, "temperature": 2.0},
}
MAX_ERROR = {torch.bfloat16: (2.5e-3, 2.5e-3), torch.float16: (2.0e-3, 2.5e-3), torch.float32: (1e-5, 1e-5)}
MAX_ERROR_OF_SIGNS = (1e-3, 5e-3)  # of total variation, whose gradient jumps where both probabilities are equal
LOSS_SCALE = 2.0**16  # of fp16, as a `GradScaler` starts with: smaller gradients underflow
SECONDS = 570


class Card:
    """The device that is measured: its clock, its memory and its synchronization; a CPU takes the GPU's place."""

    def __init__(self, name: str):
        self.device = torch.device(name)
        self.is_cuda = self.device.type == "cuda"

    def seconds(self, call: Callable[[], object], repeats: int = 7) -> list[float]:
        """Time each of some calls, after two that are not counted."""
        for _ in range(2):
            call()
        if not self.is_cuda:
            return [_wall_seconds(call) for _ in range(repeats)]
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for start, end in events:
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def peak_gib(self, call: Callable[[], object]) -> float:
        """Return the peak of allocated memory during a call, above what was allocated before, in GiB."""
        if not self.is_cuda:
            call()
            return math.nan
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**30

    def empty_cache(self) -> None:
        """Return cached blocks to the driver."""
        if self.is_cuda:
            torch.cuda.empty_cache()


def _wall_seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def correctness(card: Card, shape: dict) -> dict:
    """Compare values and gradients with float64 and logits of all tokens."""
    rows, worst = [], {}
    vocabularies = ((32000, 32000), (50257, 50257), (151936, 152064)) if card.is_cuda else ((257, 257), (256, 264))
    cases = [
        {"divergence": divergence, "temperature": temperature, "alpha": alpha, "dtype": dtype}
        for divergence in DIVERGENCES
        for temperature in (1.0, 2.0)
        for alpha in (1.0, 0.5)
        for dtype in MAX_ERROR
    ]
    special = [
        {"bias": True},
        {"softcap": 30.0},
        {"scale": 0.25},
        {"frozen": True},
        {"ignored": 0.5},
        {"ignored": 1.0},
        {"chunk_tokens": 64},
        {"chunk_tokens": 1024},
        {"tokens": 1},
    ]
    base = {"divergence": "js", "temperature": 2.0, "alpha": 0.5, "dtype": torch.bfloat16}
    runs = [(vocab, case) for vocab in vocabularies for case in cases if vocab is vocabularies[1] or _is_key(case)]
    runs += [(vocabularies[2 % len(vocabularies)], {**base, **extra}) for extra in special]
    for (vocab, teacher_vocab), case in runs:
        sizes = {"tokens": 192, "vocab": vocab, "teacher_vocab": teacher_vocab, "hidden": 256, "teacher_hidden": 320}
        options = {**sizes, **{key: case[key] for key in case if key in tensors.__kwdefaults__ or key == "tokens"}}
        inputs = tensors(card.device, **options)
        objective = {key: case[key] for key in ("divergence", "temperature", "alpha")}
        loss_scale = LOSS_SCALE if case["dtype"] is torch.float16 else 1.0
        value = ours(inputs, chunk_tokens=case.get("chunk_tokens"), loss_scale=loss_scale, **objective)
        gradients = [None if x.grad is None else x.grad.double() / loss_scale for x in inputs.trained()]
        exact = inputs.double()
        exact_value = reference(exact, **objective)
        errors = [
            _relative_error(gradient, x.grad)
            for gradient, x in zip(gradients, exact.trained(), strict=True)
            if x.requires_grad
        ]
        row = {
            **{key: str(value) if isinstance(value, torch.dtype) else value for key, value in case.items()},
            "vocab": vocab,
            "teacher_vocab": teacher_vocab,
            "value_error": abs(float(value) - float(exact_value)) / max(abs(float(exact_value)), 1e-12),
            "gradient_errors": errors,
        }
        limits = MAX_ERROR[case["dtype"]]
        if case["divergence"] == "total_variation":
            limits = tuple(map(max, limits, MAX_ERROR_OF_SIGNS))
        limits = (*limits, limits[1])
        row["passed"] = all(error <= limit for error, limit in zip(errors, limits, strict=False))
        rows.append(row)
        key = str(case["dtype"])
        worst[key] = [max(a, b) for a, b in zip(worst.get(key, [0.0, 0.0]), errors, strict=False)]
    failed = [row for row in rows if not row["passed"]]
    return {"cases": len(rows), "worst_hidden_and_weight": worst, "failed": failed, "rows": rows}


def _is_key(case: dict) -> bool:
    return case["dtype"] is torch.bfloat16 and case["temperature"] == 2.0 and case["alpha"] == 0.5


def _relative_error(value: torch.Tensor | None, exact: torch.Tensor) -> float:
    if value is None:
        return math.inf
    return float((value - exact).norm() / exact.norm().clamp(min=1e-30))


def products(card: Card, shape: dict) -> dict:
    """Time the four matrix products alone: the lower bound of any loss that computes exact gradients."""
    results = {}
    for name, sizes in (SHAPES if card.is_cuda else {"small": shape}).items():
        inputs = tensors(card.device, dtype=torch.bfloat16, **sizes)
        seconds = median(card.seconds(partial(matrix_products, inputs)))
        flop = 2 * sizes["tokens"] * sizes["vocab"] * (3 * sizes["hidden"] + sizes["teacher_hidden"])
        results[name] = {"seconds": seconds, "tflop_per_second": flop / seconds / 1e12}
        del inputs
        card.empty_cache()
    return results


def losses(card: Card, shape: dict) -> dict:
    """Time this package and others on the same tensors, interleaved, and measure their peak memory."""
    results = {}
    for name, sizes in (SHAPES if card.is_cuda else {"small": shape}).items():
        inputs = tensors(card.device, dtype=torch.bfloat16, **sizes)
        bound = median(card.seconds(partial(matrix_products, inputs)))
        calls: dict[str, Callable[[], object]] = {}
        for objective, options in OBJECTIVES.items():
            calls[f"ours, {objective}"] = partial(ours, inputs, **options)
        for peer, (call, betas) in PEERS.items():
            for objective, beta in (("KL", 0.0), ("JS", 0.5)):
                if beta in betas:
                    calls[f"{peer}, {objective}"] = partial(call, inputs, beta)
        if sizes is SHAPE:
            calls |= {
                f"ours, KL, chunk {n}": partial(ours, inputs, chunk_tokens=n, **OBJECTIVES["KL"])
                for n in (256, 1024, 4096)
            }
        calls["all logits, KL"] = partial(dense, inputs, "forward_kl")
        rows: dict[str, dict] = {}
        for label, call in calls.items():
            try:
                rows[label] = {"peak_gib": card.peak_gib(call), "runs": []}
            except Exception as error:  # not installed, or out of memory: both are results
                rows[label] = {"failed": f"{type(error).__name__}: {error}"[:300]}
                card.empty_cache()
        for _ in range(3):  # interleaved, because clocks change
            for label, row in rows.items():
                if "failed" not in row:
                    row["runs"] += card.seconds(calls[label], repeats=3)
        for row in rows.values():
            if "failed" not in row:
                row |= {"seconds": median(row["runs"]), "relative": median(row["runs"]) / bound}
        weight_gib = sizes["vocab"] * sizes["hidden"] * 4 / 2**30
        results[name] = {"products_seconds": bound, "head_gradient_gib": weight_gib, "calls": rows}
        inputs.clear_gradients()
        del inputs, calls
        card.empty_cache()
    return results


def fragmented(card: Card, shape: dict) -> dict:
    """Repeat a loss after the allocator held 85 % of the card in blocks of many sizes."""
    inputs = tensors(card.device, dtype=torch.bfloat16, **shape)
    call = partial(ours, inputs, **OBJECTIVES["KL + CE"])

    def measured() -> tuple[float, list[torch.Tensor]]:
        seconds = median(card.seconds(call))
        inputs.clear_gradients()
        call()
        return seconds, [x.grad.clone() for x in inputs.trained()]

    before, gradients = measured()
    if card.is_cuda:
        free = int(torch.cuda.mem_get_info()[0] * 0.85)
        generator, blocks = torch.Generator().manual_seed(0), []
        while free > 2**28:
            size = min(free, int(torch.randint(2**24, 2**30, (), generator=generator)))
            blocks.append(torch.empty(size, dtype=torch.uint8, device=card.device))
            free -= size
        blocks = blocks[::2]  # every other block stays allocated, so that the free ones are not contiguous
        after, again = measured()
        del blocks
    else:
        after, again = measured()
    equal = all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    return {"seconds_before": before, "seconds_after": after, "bitwise_equal": equal}


def waits(card: Card, shape: dict) -> dict:
    """Run the loss while PyTorch raises an error at each wait for the device."""
    from hf_distill.core.targets import Targets
    from hf_distill.losses.fused import ChunkedLoss
    from hf_distill.losses.objective import objective

    inputs = tensors(card.device, dtype=torch.bfloat16, **{**shape, "tokens": min(shape["tokens"], 2048)})
    targets = Targets.from_batch({"labels": inputs.labels}, shift=False)
    terms = [term for term in objective(0.5, 2.0, "js") if term.weight]
    loss = ChunkedLoss(inputs.teacher_logits(), targets, terms, 4, num_items=torch.tensor(1000, device=card.device))

    def step() -> None:
        loss.from_hidden(inputs.student_logits()).backward()

    step()
    with _sync_debug("error") if card.is_cuda else _nothing():
        try:
            step()
        except RuntimeError as error:
            return {"waits_for_the_device": True, "error": str(error)[:500], "where": traceback.format_exc()[-1500:]}
    return {"waits_for_the_device": False} if card.is_cuda else {"not_measured": "there is no GPU to wait for"}


@contextmanager
def _sync_debug(mode: str):
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def _nothing():
    yield


def profile(card: Card, shape: dict) -> dict:
    """Count the kernels of one call, and the share of time in which the GPU works."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    results = {}
    inputs = tensors(card.device, dtype=torch.bfloat16, **shape)
    for name in ("KL + CE", "JS + CE"):
        call = partial(ours, inputs, **OBJECTIVES[name])
        call()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if card.is_cuda else [])
        with profiler(activities=activities) as recorded:
            start = time.perf_counter()
            call()
            if card.is_cuda:
                torch.cuda.synchronize()
            wall = time.perf_counter() - start
        if not card.is_cuda:
            results[name] = "not measured: there is no GPU"
            continue
        kernels: dict[str, list[float]] = {}
        for event in recorded.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels.setdefault(event.name, []).append(event.device_time / 1e6)
        busy = sum(map(sum, kernels.values()))
        longest = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:15]
        results[name] = {
            "kernels": sum(map(len, kernels.values())),
            "chunks": -(-shape["tokens"] // _chunk_tokens(inputs)),
            "busy_share": busy / wall,
            "fp32_products": [kernel for kernel in kernels if "sgemm" in kernel or "f32f32_f32f32" in kernel],
            "longest": [{"kernel": kernel[:120], "calls": len(t), "seconds": sum(t)} for kernel, t in longest],
        }
    return results


def _chunk_tokens(inputs) -> int:
    from hf_distill.losses.fused_buffers import auto_chunk_tokens

    student, teacher = inputs.student_logits(), inputs.teacher_logits()
    return auto_chunk_tokens([student.vocab_size, teacher.vocab_size], 4, student.hidden.device.type)


def trainer(card: Card, shape: dict) -> dict:
    """Train with `DistillTrainer` in a process for each variant, because FSDP and compilation leave state behind."""
    results = {}
    script = Path(__file__).with_name("gpu_trainer.py")
    has_second_card = card.device.type == "cuda" and torch.cuda.device_count() > 1
    for variant in ("bf16", "fp32_teacher", "compile", "fsdp2", *(["second_card"] if has_second_card else [])):
        command = [sys.executable, str(script), variant, card.device.type]
        if variant == "fsdp2":
            command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
        first_card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # else DataParallel over all cards
        visible = {"CUDA_VISIBLE_DEVICES": first_card} if has_second_card and variant != "second_card" else {}
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | visible)
        last = done.stdout.strip().splitlines()[-1:] or [""]
        if done.returncode == 0 and last[0].startswith("{"):
            results[variant] = json.loads(last[0])
        else:
            results[variant] = {"failed": done.stderr[-2000:]}
        print("  ", variant, json.dumps(results[variant])[:300], flush=True)
    return results


STAGES = {stage.__name__: stage for stage in (correctness, products, losses, fragmented, waits, profile, trainer)}


def main() -> None:
    """Run the stages, and write the results after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            "There is no CUDA device. Run this on a machine with a GPU, or with --device cpu to test the script."
        )
    card = Card(arguments.device)
    begin = time.perf_counter()
    name = torch.cuda.get_device_name(card.device) if card.is_cuda else "cpu (small shapes: a test of the script)"
    results: dict = {"card": name, "versions": package_versions()}
    for stage in arguments.stages:
        if time.perf_counter() - begin > SECONDS:
            results[stage] = {"failed": f"not started: {SECONDS} s had passed"}
            continue
        print(stage, flush=True)
        start = time.perf_counter()
        try:
            results[stage] = STAGES[stage](card, SHAPE if card.is_cuda else SMALL)
        except Exception:  # the other stages still run
            results[stage] = {"failed": traceback.format_exc()[-3000:]}
            print(results[stage]["failed"], flush=True)
        results.setdefault("stage_seconds", {})[stage] = time.perf_counter() - start
        card.empty_cache()
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    print_table(results)
    print(f"\n{arguments.output}: {time.perf_counter() - begin:.0f} s on {name}")


if __name__ == "__main__":
    main()
