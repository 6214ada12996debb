"""Count the random bit flips in checkpoint files that verification detects, and measure what digests cost.

python bit_flips.py         (a part of `make soak`)
"""

import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from crashing import make_workload, run_in_process

from hf_distill.core.io import environment, write_json
from hf_distill.trainer import checkpoints

RESULT = Path(__file__).parent / "results" / "bit_flips.json"
FLIPS, GIBIBYTES = 100, 2
KINDS = ("frozen", "adapter_base", "ema", "mutual", "mtp")  # full weights, adapters, states of teachers, sidecars


def count_detected_flips(checkpoint: Path, generator: random.Random) -> dict[str, dict[str, int]]:
    """Flip random bits of each file of a checkpoint, one at a time, and count the flips that are detected."""
    if (defect := checkpoints.checkpoint_defect(checkpoint)) is not None:
        raise RuntimeError(f"{checkpoint}: {defect}")
    counts = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content, detected = path.read_bytes(), 0
        for _ in range(FLIPS):
            bit = generator.randrange(len(content) * 8)
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            detected += checkpoints.checkpoint_defect(checkpoint) is not None
        path.write_bytes(content)
        counts[str(path.relative_to(checkpoint))] = {"flips": FLIPS, "found": detected}
    return counts


def digest_cost(folder: Path) -> dict[str, float]:
    """Measure the seconds to write, flush and hash the weights of a checkpoint."""
    checkpoint = folder / "checkpoint-1"
    checkpoint.mkdir()
    tensors = {f"layer.{i}": torch.randn(2**26) for i in range(GIBIBYTES * 4)}
    start = time.perf_counter()
    save_file(tensors, checkpoint / "model.safetensors")
    written = time.perf_counter()
    checkpoints._flush(checkpoint / "model.safetensors")
    flushed = time.perf_counter()
    checkpoints._digest(checkpoint / "model.safetensors")
    hashed = time.perf_counter()
    size = (checkpoint / "model.safetensors").stat().st_size / 2**30
    return {
        "gib": size,
        "write_s": written - start,
        "flush_s": flushed - written,
        "digest_s": hashed - flushed,
        "digest_share_of_saving": (hashed - flushed) / (flushed - start),
        "digest_gib_per_s": size / (hashed - flushed),
    }


def measure() -> dict[str, Any]:
    """Return the results of all kinds of checkpoints."""
    files: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for kind in KINDS:
            if code := run_in_process(make_workload(kind, folder), folder / kind):
                raise RuntimeError(f"{kind} ended with {code}: {(folder / kind / 'log').read_text()[-3000:]}")
            newest = checkpoints.checkpoints_of(folder / kind / "run")[0]
            files[kind] = count_detected_flips(newest, random.Random(0))
            print(kind, files[kind], flush=True)
        digest = digest_cost(folder)
    counts = [count for of_kind in files.values() for count in of_kind.values()]
    totals = {"flips": sum(c["flips"] for c in counts), "found": sum(c["found"] for c in counts)}
    return {"environment": environment("cpu"), **totals, "files": files, "digest": {"kind": "XXH3-128", **digest}}


if __name__ == "__main__":
    write_json(RESULT, measure())
