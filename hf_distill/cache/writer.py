"""Writes the shards of a cache: the teacher runs on the training data; an interrupted write is resumed.

A shard always contains the same rows in the same batches, independent of the process that writes it, so an interrupted
and an uninterrupted write give the same bytes.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Protocol

import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file
from torch import Tensor

from ..core.files import file_entry
from ..core.logits import LazyLogits
from ..core.signals import FeatureKey, Signals
from ..core.targets import FeatureTokens, Targets
from ..core.teacher_inputs import teacher_inputs
from ..errors import DistillError
from ..models.finite_weights import check_finite
from .example_keys import Example, batch_examples, fingerprint
from .manifest import HEAD, DataCounts, Manifest, atomic_cache_file
from .ranks import barrier, rank, world_size
from .reader import CachedExample, write_shard
from .serialization import encode_signals
from .unfinished import finish, is_written, lock_capture, open_output, shard_file, verify_written, write_entry

TeacherFn = Callable[[dict, Targets, Mapping[FeatureKey, FeatureTokens]], Signals]


class Rows(Protocol):
    """Rows that are read by their index: a `datasets.Dataset`, or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict: ...


@dataclass(frozen=True)
class CacheProgress:
    """Progress of a write.

    tokens:            target tokens that the teacher has answered so far; those of a shard are written when it is full
    total_tokens:      target tokens of the complete cache
    bytes_per_token:   bytes per token of the shards that this process wrote; 0 before the first one
    tokens_per_second: throughput of all processes since the write was started or resumed
    seconds_left:      estimated remaining seconds at this throughput
    """

    tokens: int
    total_tokens: int
    bytes_per_token: float
    tokens_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class ShardPlan:
    """The batches of a cache and their division into shards.

    batch:  returns the batch with a number
    tokens: number of target tokens of each batch
    shards: [start, end) of the batches of each shard
    """

    batch: Callable[[int], dict]
    tokens: list[int]
    shards: list[tuple[int, int]]


def plan_shards(
    parts: Sequence[Rows], collate: Callable[[list], dict], batch_size: int, shard_rows: int, shift: bool
) -> tuple[ShardPlan, DataCounts]:
    """Plan the batches and shards of a cache; a row is left out if an earlier row has the same examples.

    Args:
        parts: data sets, which are concatenated.
        collate: the collator of the training.
        batch_size: rows per batch.
        shard_rows: rows per shard.
        shift: see `target_labels`.

    Returns:
        the plan; and {"examples", "tokens", "fingerprint"} for the manifest.

    Raises:
        DistillError: the data has no target tokens.
    """
    keys: set[bytes] = set()
    rows: list[tuple[Rows, int, int]] = []  # data set, row, number of target tokens
    count = 0
    for part in parts:
        for i in range(len(part)):
            batch = teacher_inputs(collate([part[i]]))
            examples = batch_examples(batch, Targets.from_batch(batch, shift))
            if any(example.key not in keys for example in examples):
                rows.append((part, i, examples[-1].target_slice.stop))
                count += len(examples)
            keys.update(example.key for example in examples)
    if not rows:
        raise DistillError("No row of the data has target tokens, so there is nothing to write: check the labels.")
    shards = [rows[start : start + shard_rows] for start in range(0, len(rows), shard_rows)]
    batches = [[shard[start : start + batch_size] for start in range(0, len(shard), batch_size)] for shard in shards]
    flat = [batch_rows for shard_batches in batches for batch_rows in shard_batches]
    ends = list(accumulate(map(len, batches), initial=0))

    def collate_batch(number: int) -> dict:
        return collate([part[i] for part, i, _ in flat[number]])

    tokens = [sum(num_targets for _, _, num_targets in batch_rows) for batch_rows in flat]
    facts: DataCounts = {"examples": count, "tokens": sum(tokens), "fingerprint": fingerprint([*keys])}
    return ShardPlan(collate_batch, tokens, list(pairwise(ends))), facts


def write_shards(
    teacher_fn: TeacherFn,
    plan: ShardPlan,
    manifest: Manifest,
    folder: Path,
    device: torch.device,
    shift: bool,
    on_progress: Callable[[CacheProgress], None] = lambda progress: None,
) -> Manifest:
    """Write a cache, or resume an interrupted write.

    Each process writes its share of the shards. All processes call the teacher equally often, so it may be sharded.

    Args:
        teacher_fn: returns the teacher signals of a batch.
        plan: see `plan_shards`.
        manifest: the manifest without files.
        folder: the folder of the cache.
        device: device of the batches.
        shift: see `target_labels`.
        on_progress: called after each batch, and after the last batch of a shard once the shard is written.

    Raises:
        DistillError: the folder holds another cache, another process writes to it, the disk is full, or the teacher
            does not support this kind of cache.
    """
    with lock_capture(folder):
        complete = open_output(folder, manifest)
        if complete is not None:
            return complete
        return _write_missing(_ShardWriter(teacher_fn, plan, manifest, folder, device, shift), on_progress)


def _write_missing(writer: "_ShardWriter", on_progress: Callable[[CacheProgress], None]) -> Manifest:
    """Write the missing shards and complete the cache."""
    plan, folder = writer.plan, writer.folder
    start_time, answered = time.perf_counter(), 0
    is_complete = verify_written(folder, len(plan.shards))
    shard_tokens = [sum(plan.tokens[first:end]) for first, end in plan.shards]
    before = sum(tokens for tokens, complete in zip(shard_tokens, is_complete, strict=True) if complete)
    world, total = world_size(), sum(plan.tokens)

    def report() -> None:
        tokens_per_second = answered / (time.perf_counter() - start_time)
        seconds_left = (total - before - answered) / tokens_per_second if answered else 0.0
        bytes_per_token = writer.bytes / max(writer.tokens, 1)
        on_progress(CacheProgress(before + answered, total, bytes_per_token, tokens_per_second, seconds_left))

    for first in range(0, len(plan.shards), world):
        group = range(first, min(first + world, len(plan.shards)))  # one shard for each process
        missing = [plan.shards[i] for i in group if not is_complete[i]]
        if not missing:
            continue
        shard = next((i for i in group if i % world == rank() and not is_complete[i]), None)
        steps = max(end - begin for begin, end in (plan.shards[i] for i in group))
        for step in writer.write(shard, steps):
            answered += sum(plan.tokens[begin + step] for begin, end in missing if begin + step < end)
            report()
    barrier()
    if writer.manifest.kind == "hidden" and not is_written(folder, HEAD):
        writer.run_teacher(0)  # all shards are complete, but the head is missing
        barrier()
    return finish(folder, writer.manifest, len(plan.shards))


class _ShardWriter:
    """Writes the shards of one process."""

    def __init__(
        self,
        teacher_fn: TeacherFn,
        plan: ShardPlan,
        manifest: Manifest,
        folder: Path,
        device: torch.device,
        shift: bool,
    ):
        self.teacher_fn, self.plan, self.manifest, self.folder = teacher_fn, plan, manifest, folder
        self.device, self.shift = device, shift
        self.tokens = self.bytes = 0
        self.layers = manifest.options.get("layers", ())

    def write(self, number: int | None, steps: int) -> Iterator[int]:
        """Write a shard, and yield the number of each batch, of the last one when the shard is written.

        Args:
            number: number of the shard; None: only run the teacher, because a sharded teacher needs all processes.
            steps: how often each process calls the teacher.
        """
        first, end = self.plan.shards[0 if number is None else number]
        keys: list[bytes] = []
        stored: list[CachedExample] = []
        for step in range(steps):
            teacher_signals, examples, labels = self.run_teacher(min(first + step, end - 1))
            if number is not None and first + step < end:
                keys += [example.key for example in examples]
                stored += encode_signals(teacher_signals, examples, self.manifest, labels)
            if step + 1 < steps:
                yield step
        if number is not None:
            entry = write_shard(self.folder / shard_file(number), keys, stored, self.layers)
            write_entry(self.folder, entry)
            self.tokens, self.bytes = self.tokens + entry["tokens"], self.bytes + entry["bytes"]
        yield steps - 1

    def run_teacher(self, number: int) -> tuple[Signals, list[Example], Tensor]:
        """Return the teacher signals of a batch, its examples and its labels [T]; the first call writes the output head
        if needed.
        """
        batch, targets = load_batch(self.plan, number, self.device, self.shift)
        teacher_signals = self.teacher_fn(batch, targets, request_layers(self.layers, batch, targets, self.shift))
        if self.manifest.kind == "hidden" and rank() == 0 and not is_written(self.folder, HEAD):
            assert isinstance(teacher_signals.logits, LazyLogits)
            write_head(self.folder / HEAD, teacher_signals.logits)
            write_entry(self.folder, file_entry(self.folder / HEAD))
        return teacher_signals, batch_examples(batch, targets), targets.labels


def load_batch(plan: ShardPlan, number: int, device: torch.device, shift: bool) -> tuple[dict, Targets]:
    """Return a batch on a device, and its target tokens."""
    batch = {name: value for name, value in plan.batch(number).items() if name != "source"}
    batch = dict(send_to_device(teacher_inputs(batch), device))
    return batch, Targets.from_batch(batch, shift)


def request_layers(
    layers: Sequence[int], batch: dict, targets: Targets, causal: bool
) -> dict[FeatureKey, FeatureTokens]:
    """Return the feature requests for the hidden states of further layers."""
    return {FeatureKey("hidden", layer): targets.feature_tokens(batch, causal) for layer in layers}


def write_head(file: Path, head: LazyLogits) -> None:
    """Write the output head of a teacher atomically.

    Raises:
        RunError: its weights are not finite.
    """
    tensors = {"weight": head.weight} | ({} if head.bias is None else {"bias": head.bias})
    advice = "Load the teacher in another dtype, such as bfloat16 instead of float16."
    check_finite(tensors, file, owner="the teacher's output head", advice=advice)
    with atomic_cache_file(file) as temporary:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, temporary)
