"""From what a teacher says to what is stored, and back."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, SparseLogProbs
from ..core.signals import FeatureKey, Signals
from ..errors import DistillError
from . import codec
from .codec import Ragged
from .example_keys import Example, example_seed
from .manifest import Manifest
from .reader import CachedExample
from .sampling import blocks_of, sample_by_inverse_cdf, systematic_points

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_LIFT = 64.0  # nats that are added to -log of a draw's weight, which may be below 0


def encode_signals(told: Signals, examples: Sequence[Example], manifest: Manifest) -> list[CachedExample]:
    """What a cache keeps of a batch's examples.

    Args:
        told: by the teacher, of all T asked tokens: `Head` or `Logits`, and the hidden states of the cache's layers.
        examples: of the batch.
        manifest: says the kind and its options.
    """
    if manifest.kind == "hidden":
        layers = [told.features[FeatureKey("hidden", layer)] for layer in manifest.options["layers"]]
        assert isinstance(told.logits, LazyLogits)
        dtype = DTYPES[manifest.options["dtype"]]
        rows = [_rows(tensor.to(dtype)) for tensor in (told.logits.hidden, *layers)]
        return [
            CachedExample(
                e.asked.stop - e.asked.start, 0, rows[0](e.asked), [of_layer(e.asked) for of_layer in rows[1:]]
            )
            for e in examples
        ]
    assert isinstance(told.logits, LazyLogits | DenseLogits)
    found = _sampled(told.logits, examples, manifest) if manifest.kind == "sampled" else _top_k(told.logits, manifest)
    return [_one(found, example.asked, manifest.vocab_size) for example in examples]


def _rows(tensor: Tensor) -> Any:
    whole = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
    return lambda asked: whole[asked].tobytes()


def _one(found: Ragged, asked: slice, vocab_size: int) -> CachedExample:
    bounds = np.concatenate([[0], np.cumsum(found.sizes, dtype=np.int64)])
    ids = slice(bounds[asked.start], bounds[asked.stop])
    own = Ragged(found.sizes[asked], found.ids[ids], found.values[ids], found.extra[asked])
    return CachedExample(len(own), len(own.ids), codec.encode(own, vocab_size), [])


def _top_k(source: LazyLogits | DenseLogits, manifest: Manifest) -> Ragged:
    k, temperature, parts = min(manifest.options["k"], manifest.vocab_size), float(manifest.temperature or 1.0), []
    for _, logits in blocks_of(source):
        logits = logits if temperature == 1 else logits.div_(temperature)
        ids = logits.topk(k, dim=-1).indices.sort(dim=-1).values
        kept = (logits.gather(-1, ids) - torch.logsumexp(logits, -1, keepdim=True)).double()
        tail = (-torch.expm1(torch.logsumexp(kept, -1))).clamp(min=0).log()
        parts.append([x.cpu().numpy() for x in (ids, -kept, -tail)])
    ids, kept, tail = (np.concatenate(column) for column in zip(*parts, strict=True))
    sizes = np.full(len(ids), k, dtype=np.uint16)
    return Ragged(sizes, ids.reshape(-1), codec.quantize_nats(kept.reshape(-1)), codec.quantize_nats(tail))


def _sampled(source: LazyLogits | DenseLogits, examples: Sequence[Example], manifest: Manifest) -> Ragged:
    """Systematic draws; of each distinct id how often, or its weight where the proposal is another one."""
    draws, proposal = manifest.options["samples_per_token"], float(manifest.options["proposal_temperature"])
    temperature = float(manifest.temperature or 1.0)
    seed = manifest.options["seed"]
    each = [(example.asked.stop - example.asked.start, example_seed(example.key, seed)) for example in examples]
    uniform = torch.cat([systematic_points(count, draws, own) for count, own in each])  # which belongs to the example
    parts = []
    for rows, logits in blocks_of(source):
        own = uniform[rows].to(logits.device)
        if proposal == temperature:
            ids, log_q = sample_by_inverse_cdf(logits if temperature == 1 else logits.div_(temperature), own)
            log_p = log_q
        else:
            ids, log_q = sample_by_inverse_cdf(logits / proposal, own)
            logits = logits.div_(temperature)
            log_p = (logits.gather(1, ids) - torch.logsumexp(logits, -1, keepdim=True)).double()
        weight = log_p - log_q - math.log(draws)  # of one draw
        expected = (weight.exp() * log_p).sum(1)
        parts.append([x.cpu().numpy() for x in (ids, weight, expected)])
    ids, weight, expected = (np.concatenate(column) for column in zip(*parts, strict=True))
    first = np.diff(ids, axis=1, prepend=-1) != 0
    sizes = first.sum(1).astype(np.uint16)
    counts = np.diff(np.append(np.flatnonzero(first), first.size))
    values = counts if proposal == temperature else codec.quantize_nats(_LIFT - weight[first] - np.log(counts))
    return Ragged(sizes, ids[first], values, codec.quantize_nats(-expected))


def decode_signals(
    stored: Sequence[CachedExample], manifest: Manifest, head: dict[str, Any], device: torch.device, ids: int
) -> Signals:
    """What the teacher said of the asked tokens of some examples, one example after another.

    Args:
        stored: of the examples.
        manifest: of the cache.
        head: weight, bias and scaling of a cache of hidden states.
        device: where the student runs.
        ids: V of the student; what the teacher says of others is left out.

    Raises:
        DistillError: bytes that were not written by the codec.
    """
    if manifest.kind == "hidden":
        width, dtype = int(manifest.width or 0), DTYPES[manifest.options["dtype"]]
        hidden = _joined([s.payload for s in stored], width, dtype, device)
        features = {
            FeatureKey("hidden", layer): _joined([s.layers[i] for s in stored], width, dtype, device)
            for i, layer in enumerate(manifest.options["layers"])
        }
        return Signals(LazyLogits(hidden.to(head["weight"].dtype) if hidden.is_cuda else hidden, **head), features)
    columns = ([s.payload for s in stored], [s.tokens for s in stored], [s.ids for s in stored])
    found = codec.decode(*columns, manifest.vocab_size)
    return Signals(_sparse(found, manifest, device, ids))


def _sparse(found: Ragged, manifest: Manifest, device: torch.device, vocab_size: int) -> SparseLogProbs:
    ids, values, there = codec.padded(found)
    options, temperature, extra = (
        manifest.options,
        float(manifest.temperature or 1.0),
        -codec.dequantize_nats(found.extra),
    )
    if manifest.kind == "top_k":
        logs = -codec.dequantize_nats(values)
    elif options["proposal_temperature"] == temperature:
        logs = np.log(np.maximum(values, 1) / options["samples_per_token"], dtype=np.float32)
    else:
        logs = _LIFT - codec.dequantize_nats(values)
    logs[~there] = -np.inf
    if (beyond := ids >= vocab_size).any():  # padding of the teacher's vocabulary
        if manifest.kind == "top_k":
            left = np.log1p(-np.where(beyond, np.exp(logs), 0).sum(1).clip(max=1 - 1e-6))
            logs, extra = logs - left[:, None], extra - left
        logs[beyond], ids[beyond] = -np.inf, 0
    tensors = [torch.from_numpy(x).to(device) for x in (ids, logs, extra)]
    tail, expected = (tensors[2], None) if manifest.kind == "top_k" else (None, tensors[2])
    return SparseLogProbs(tensors[0], tensors[1], tail, temperature, expected, manifest.vocab_size)


def _joined(parts: Sequence[Any], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[T, H] of stored rows, one example after another."""
    bytes_each = width * dtype.itemsize
    rows = torch.empty(sum(len(part) for part in parts) // bytes_each, width, dtype=dtype)
    flat, start = rows.view(torch.uint8).numpy().reshape(-1), 0
    for part in parts:
        flat[start : start + len(part)] = np.frombuffer(part, dtype=np.uint8)
        start += len(part)
    return rows.to(device)


def check_kind(kind: str, told: Signals) -> None:
    """Refuse a teacher whose signals cannot be stored in this way.

    Raises:
        DistillError: says why, and which kinds can.
    """
    if not isinstance(told.logits, LazyLogits | DenseLogits):
        raise DistillError("The teacher tells no logits of its own: give the model as `source`, of kind frozen.")
    if kind == "hidden" and not isinstance(told.logits, LazyLogits):
        raise DistillError(
            "The teacher's output head is no plain linear layer that follows its last hidden state, so these do not "
            "tell its logits: write --kind sampled or --kind top_k."
        )
