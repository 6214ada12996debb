"""Two processes write three caches together: python two_writers.py FOLDER

FOLDER/locked and FOLDER/foreign raise errors, which each process writes to stderr. In FOLDER/cut, rank 1 ends after its
first shard.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from tiny import build, collate, rows

from hf_distill.cache import write_cache
from hf_distill.errors import DistillError


def write(folder: Path, **options):
    """Write a small cache of six shards."""
    return write_cache(folder, build("llama"), rows("llama", 12), collator=collate, batch_size=2, shard_rows=2,
                       kind="sampled", **options)  # fmt: skip


def die(progress) -> None:
    if torch.distributed.get_rank() == 1 and progress.bytes_per_token:  # its first shard is written
        os._exit(13)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    for name in ("locked", "foreign"):
        try:
            write(Path(sys.argv[1]) / name)
        except DistillError as error:
            sys.stderr.write(f"{name}: {error}\n")
    write(Path(sys.argv[1]) / "cut", on_progress=die)
