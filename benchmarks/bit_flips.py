"""How many of 100 random bit flips in each kind of checkpoint file are found, and what digests cost.

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
from crashing import make_workload, started

from hf_distill.core.io import environment, write_json
from hf_distill.trainer import checkpoints

RESULT = Path(__file__).parent / "results" / "bit_flips.json"
FLIPS, GIBIBYTES = 100, 2
KINDS = ("frozen", "adapter_base", "ema", "mutual", "mtp")  # full weights, adapters, teachers' states, sidecars


def flips(checkpoint: Path, generator: random.Random) -> dict[str, dict[str, int]]:
    """For each file of a checkpoint: bits that were flipped, one at a time, and how many flips were found."""
    if (found := checkpoints.checkpoint_defect(checkpoint)) is not None:
        raise RuntimeError(f"{checkpoint}: {found}")
    counts = {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        content, seen = path.read_bytes(), 0
        for _ in range(FLIPS):
            bit = generator.randrange(len(content) * 8)
            flipped = bytearray(content)
            flipped[bit // 8] ^= 1 << bit % 8
            path.write_bytes(flipped)
            seen += checkpoints.checkpoint_defect(checkpoint) is not None
        path.write_bytes(content)
        counts[str(path.relative_to(checkpoint))] = {"flips": FLIPS, "found": seen}
    return counts


def cost(place: Path) -> dict[str, float]:
    """Seconds to write a checkpoint's weights, to flush them, and to hash them, and to verify them on resume."""
    folder = place / "checkpoint-1"
    folder.mkdir()
    tensors = {f"layer.{i}": torch.randn(2**26) for i in range(GIBIBYTES * 4)}
    start = time.perf_counter()
    save_file(tensors, folder / "model.safetensors")
    written = time.perf_counter()
    checkpoints._flush(folder / "model.safetensors")
    flushed = time.perf_counter()
    checkpoints._digest(folder / "model.safetensors")
    hashed = time.perf_counter()
    size = (folder / "model.safetensors").stat().st_size / 2**30
    return {
        "gib": size,
        "write_s": written - start,
        "flush_s": flushed - written,
        "digest_s": hashed - flushed,
        "digest_share_of_saving": (hashed - flushed) / (flushed - start),
        "digest_gib_per_s": size / (hashed - flushed),
    }


def measured() -> dict[str, Any]:
    """All of it."""
    files: dict[str, dict[str, dict[str, int]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for kind in KINDS:
            if code := started(make_workload(kind, place), place / kind):
                raise RuntimeError(f"{kind} ended with {code}: {(place / kind / 'log').read_text()[-3000:]}")
            newest = checkpoints.checkpoints_of(place / kind / "run")[0]
            files[kind] = flips(newest, random.Random(0))
            print(kind, files[kind], flush=True)
        price = cost(place)
    every = [count for of_kind in files.values() for count in of_kind.values()]
    totals = {"flips": sum(c["flips"] for c in every), "found": sum(c["found"] for c in every)}
    return {"environment": environment("cpu"), **totals, "files": files, "digest": {"kind": "XXH3-128", **price}}


if __name__ == "__main__":
    write_json(RESULT, measured())
