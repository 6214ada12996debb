"""Writing a cache: the teacher answers the training data itself, shard by shard; what was cut off goes on.

Each shard is what the teacher says of the same rows in the same batches, whenever and by whichever process it is made,
so a capture that was stopped and one that was not leave the same bytes.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..core.logits import LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import Targets
from ..errors import DistillError
from ..models.finite_weights import check_finite
from .example_keys import Example, batch_examples, fingerprint
from .files import atomic_path, file_entry
from .manifest import HEAD, Manifest
from .ranks import barrier, rank, world_size
from .reader import CachedExample, write_shard
from .serialization import encode_signals
from .unfinished import finish, is_written, lock_capture, open_output, shard_file, verify_written, write_entry

TeacherFn = Callable[[dict, Targets, Mapping[FeatureKey, Targets]], Signals]


@dataclass(frozen=True)
class CacheProgress:
    """How far a capture is.

    tokens:            stored by now, of `total_tokens`
    of:                tokens in all
    bytes_per_token:   of what this process has stored
    tokens_per_second: of this run of it, all processes together
    seconds_left:      at that pace
    """

    tokens: int
    total_tokens: int
    bytes_per_token: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class ShardPlan:
    """What is captured: rows of the training data as training gets them, and those for evaluation.

    batch:  the collator's batch of a number
    tokens: asked, of each batch
    shards: [start, end) of the batches of each shard
    """

    batch: Callable[[int], dict]
    tokens: list[int]
    shards: list[tuple[int, int]]


def plan_shards(
    parts: Sequence[Any], collate: Callable, batch_size: int, shard_rows: int, shift: bool
) -> tuple[ShardPlan, dict[str, Any]]:
    """Which rows are captured, in which batches and shards: a row whose examples were all met before is left out.

    Args:
        parts: data sets, one after another.
        collate: the training's own collator.
        batch_size: rows of a batch.
        shard_rows: rows of a shard.
        shift: see `target_labels`.

    Returns:
        the rows; and {"examples", "tokens", "fingerprint"} for the manifest.

    Raises:
        DistillError: nothing is asked.
    """
    seen: set[bytes] = set()
    kept: list[tuple[Any, int, int]] = []
    count = 0
    for part in parts:
        for i in range(len(part)):
            batch = collate([part[i]])
            found = batch_examples(batch, Targets.from_batch(batch, shift))
            if any(example.key not in seen for example in found):
                kept.append((part, i, found[-1].asked.stop))
                count += len(found)
            seen.update(example.key for example in found)
    if not kept:
        raise DistillError("No row of the data asks anything, so there is nothing to write.")
    shards = [kept[a : a + shard_rows] for a in range(0, len(kept), shard_rows)]
    spans = [[shard[a : a + batch_size] for a in range(0, len(shard), batch_size)] for shard in shards]
    flat = [span for of_shard in spans for span in of_shard]
    ends = list(accumulate(map(len, spans), initial=0))

    def batch_of(number: int) -> dict:
        return collate([part[i] for part, i, _ in flat[number]])

    tokens = [sum(asked for _, _, asked in span) for span in flat]
    facts = {"examples": count, "tokens": sum(tokens), "fingerprint": fingerprint([*seen])}
    return ShardPlan(batch_of, tokens, list(pairwise(ends))), facts


def write_shards(
    teacher_fn: TeacherFn,
    rows: ShardPlan,
    manifest: Manifest,
    folder: Path,
    device: torch.device,
    shift: bool,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
) -> Manifest:
    """Write a cache, or go on with one that was cut off.

    On several processes each writes the shards that are its own; a teacher that is sharded over them runs in step.

    Args:
        teacher_fn: what the teacher says of a batch; called equally often on all processes.
        rows: see `plan_shards`.
        manifest: without files.
        folder: of the cache.
        device: of the batches.
        shift: see `target_labels`.
        on_progress: told after each shard.

    Raises:
        DistillError: the folder holds another cache, another process writes into it, the disk is full, or the teacher
            cannot be captured so.
    """
    with lock_capture(folder):
        done = open_output(folder, manifest)
        return (
            _capture(_ShardWriter(teacher_fn, rows, manifest, folder, device, shift), on_progress)
            if done is None
            else done
        )


def _capture(run: "_ShardWriter", on_progress: Callable[[CacheProgress], None]) -> Manifest:
    """Write the shards that are missing, and end the capture."""
    rows, folder = run.rows, run.folder
    start, stored = time.perf_counter(), 0
    ready = verify_written(folder, len(rows.shards))
    before = sum(sum(rows.tokens[a:b]) for (a, b), whole in zip(rows.shards, ready, strict=True) if whole)
    world, total = world_size(), sum(rows.tokens)
    for first in range(0, len(rows.shards), world):
        together = range(first, min(first + world, len(rows.shards)))
        if all(ready[i] for i in together):
            continue
        own = next((i for i in together if i % world == rank() and not ready[i]), None)
        run.shard(own, steps=max(b - a for a, b in (rows.shards[i] for i in together)))
        stored += sum(sum(rows.tokens[slice(*rows.shards[i])]) for i in together if not ready[i])
        pace = stored / (time.perf_counter() - start)
        left = total - before - stored
        on_progress(CacheProgress(before + stored, total, run.bytes / max(run.tokens, 1), pace, left / pace))
    barrier()
    if run.manifest.kind == "hidden" and not is_written(folder, HEAD):
        run.answer(0)  # all shards were there, and the head was not
        barrier()
    return finish(folder, run.manifest, len(rows.shards))


class _ShardWriter:
    """One process's part of a capture."""

    def __init__(self, teacher_fn: TeacherFn, rows: ShardPlan, manifest: Manifest, folder: Path, device, shift: bool):
        self.teacher_fn, self.rows, self.manifest, self.folder = teacher_fn, rows, manifest, folder
        self.device, self.shift = device, shift
        self.tokens = self.bytes = 0
        self.layers = manifest.options.get("layers", ())

    def shard(self, number: int | None, steps: int) -> None:
        """Write a shard; None: answer as often as the others do, for a teacher that is sharded, and write nothing."""
        first, last = self.rows.shards[0 if number is None else number]
        keys: list[bytes] = []
        stored: list[CachedExample] = []
        for step in range(steps):
            told, examples = self.answer(min(first + step, last - 1))
            if number is not None and first + step < last:
                keys += [e.key for e in examples]
                stored += encode_signals(told, examples, self.manifest)
        if number is None:
            return
        entry = write_shard(self.folder / shard_file(number), keys, stored, self.layers)
        write_entry(self.folder, entry)
        self.tokens, self.bytes = self.tokens + entry["tokens"], self.bytes + entry["bytes"]

    def answer(self, number: int) -> tuple[Signals, list[Example]]:
        """What the teacher says of a batch, and of which examples."""
        batch, targets = batch_of(self.rows, number, self.device, self.shift)
        told = self.teacher_fn(batch, targets, taps_of(self.layers, batch, targets, self.shift))
        if self.manifest.kind == "hidden" and rank() == 0 and not is_written(self.folder, HEAD):
            assert isinstance(told.logits, LazyLogits)
            write_head(self.folder / HEAD, told.logits)
            write_entry(self.folder, file_entry(self.folder / HEAD))
        return told, batch_examples(batch, targets)


def batch_of(rows: ShardPlan, number: int, device: torch.device, shift: bool) -> tuple[dict, Targets]:
    """A batch on a device, and what it asks."""
    batch = {name: value.to(device) for name, value in rows.batch(number).items() if name != "source"}
    return batch, Targets.from_batch(batch, shift)


def taps_of(layers: Sequence[int], batch: dict, targets: Targets, causal: bool) -> dict[FeatureKey, Targets]:
    """The hidden states that are stored beside the last one."""
    return {FeatureKey("hidden", layer): targets.feature_positions(batch, causal) for layer in layers}


def write_head(file: Path, head: LazyLogits) -> None:
    """The output head of a teacher, whole or not at all.

    Raises:
        RunError: its weights are not finite.
    """
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    advice = "Load the teacher in another dtype, such as bfloat16 in the place of float16."
    check_finite(tensors, file, owner="the teacher's output head", advice=advice)
    with atomic_path(file) as half:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, half)
