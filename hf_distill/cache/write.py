"""`write_cache`: what a teacher says of the training data, written once."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..blocks import stack_of
from ..errors import tell
from ..forward import answering, teacher_signals
from ..sources import Head
from ..tasks import bare, task_of
from .capture import Ask, Progress, Rows, batch_of, capture, plan_rows, taps_of
from .facts import digest_of_template, digest_of_tokenizer, digest_of_weights
from .manifest import Kind, Manifest
from .signals import check_kind

KINDS = ("hidden", "sampled", "top_k")
_PACKAGES = ("torch", "transformers", "datasets", "pyarrow", "hf-distill")


def write_cache(
    folder: str | Path,
    teacher: Any,
    *rows: Any,
    collator: Callable[[list], dict],
    kind: Kind = "hidden",
    temperature: float = 2.0,
    draws: int = 12,
    proposal: float | None = None,
    k: int = 64,
    dtype: str = "bfloat16",
    layers: Sequence[int] = (),
    seed: int = 0,
    processing_class: Any = None,
    batch_size: int = 8,
    shard_rows: int = 256,
    device: torch.device | str | None = None,
    reference: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    max_length: int | None = None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Manifest:
    """Write what a teacher says of the asked tokens of some rows; a capture that was cut off goes on.

    hidden:  its last hidden states and, once, its output head: every divergence at every temperature, exactly
    sampled: draws from its distribution at `temperature` (random sampling KD, 2503.16870): forward KL without bias
    top_k:   log-probabilities at `temperature` of its k likeliest ids, and the mass of the rest

    Args:
        folder: new or empty, or of the same capture.
        teacher: a model, or a prepared `Teacher` that does not move.
        rows: data sets of rows as the trainer gets them, such as those of training and of evaluation.
        collator: the trainer's.
        kind: see above.
        temperature: of sampled and top_k; a run that reads the cache must have the same.
        draws: of sampled, of each token.
        proposal: temperature of the distribution that is drawn from, with weights p / q; None: `temperature`.
        k: of top_k.
        dtype: of hidden states.
        layers: of hidden: blocks of the teacher whose outputs are stored too, for losses on hidden states.
        seed: of the draws, which depend on it and on the example alone.
        processing_class: the tokenizer, so that a run with another one is refused.
        batch_size: rows of a batch.
        shard_rows: rows of a shard: what is lost at most where a capture is cut off.
        device: of the batches; None: the teacher's.
        reference: how the teacher is called: {"model", "revision"}; None: its name_or_path.
        recipe: from which this is written, to be kept in the manifest.
        max_length: of the rows, to be told where another one is asked for.
        on_progress: told after each shard.

    Returns:
        the manifest of the whole cache.

    Raises:
        DistillError: a value out of range, a teacher that cannot be captured in this kind, a folder that holds
            something else, a disk that is full.
    """
    _check(kind, temperature, draws, proposal, k, dtype, layers, batch_size, shard_rows, seed)
    model = teacher if isinstance(teacher, nn.Module) else teacher.model
    shift = task_of(model).shift
    device = torch.device(device or next(model.parameters()).device)
    ask: Ask = _asking(teacher) if isinstance(teacher, nn.Module) else teacher
    planned, data = plan_rows(rows, collator, batch_size, shard_rows, shift)
    options: dict[str, Any] = {"dtype": dtype, "layers": list(layers)}
    if kind == "sampled":
        options = {"draws": draws, "proposal": proposal or temperature, "seed": seed}
    if kind == "top_k":
        options = {"k": k}
    manifest = Manifest(
        kind=kind,
        options=options,
        temperature=None if kind == "hidden" else temperature,
        teacher=(reference or {"model": bare(model).name_or_path}) | {
            "class": type(bare(model)).__name__, "weights": digest_of_weights(model)
        },
        tokenizer=digest_of_tokenizer(processing_class),
        chat_template=digest_of_template(processing_class),
        data=data | {"max_length": max_length, "batch_size": batch_size, "shard_rows": shard_rows},
        versions={name: version(name) for name in _PACKAGES},
        recipe=recipe,
        depth=len(stack_of(model).blocks),
        **_tried(ask, planned, kind, device, shift, layers),
    )  # fmt: skip
    return capture(ask, planned, manifest, Path(folder), device, shift, on_progress)


def _asking(model: nn.Module) -> Ask:
    def ask(inputs, targets, wanted):
        with answering(model):
            return teacher_signals(model, inputs, targets, wanted)

    return ask


def _tried(ask: Ask, rows: Rows, kind: str, device: torch.device, shift: bool, layers: Sequence[int]) -> dict[str, Any]:
    """What the teacher's first answer tells of it."""
    batch, targets = batch_of(rows, 0, device, shift)
    told = ask(batch, targets, taps_of(layers, batch, targets, shift))
    check_kind(kind, told)
    source: Any = told.logits
    head = source if isinstance(source, Head) else None
    return {
        "vocab_size": source.vocab_size,
        "width": None if head is None else head.hidden.shape[-1],
        "scaling": {"scale": 1.0, "softcap": None}
        if head is None
        else {"scale": head.scaling.scale, "softcap": head.scaling.softcap},
    }


def _check(kind, temperature, draws, proposal, k, dtype, layers, batch_size, shard_rows, seed) -> None:
    problems = []
    if kind not in KINDS:
        problems.append(f"kind is {kind!r}; known: {', '.join(KINDS)}")
    for name, value in (("temperature", temperature), ("proposal", 1.0 if proposal is None else proposal)):
        if not 0 < value < float("inf"):
            problems.append(f"{name} is {value}; it must be a positive number")
    for name, value in (("draws", draws), ("k", k), ("batch_size", batch_size), ("shard_rows", shard_rows)):
        if not isinstance(value, int) or not 1 <= value < 1 << 16:
            problems.append(f"{name} is {value!r}; it must be a whole number from 1 to 65535")
    if not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        problems.append(f"seed is {seed!r}; it must be a whole number, 0 or more")
    if dtype not in ("bfloat16", "float16", "float32"):
        problems.append(f"dtype is {dtype!r}; known: bfloat16, float16, float32")
    if layers and kind != "hidden":
        problems.append(f"a cache of kind {kind} has no hidden states: leave layers out, or write kind hidden")
    tell(problems)
