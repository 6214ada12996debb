"""Converts teacher signals to stored examples and back."""

import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..core.logits import DenseLogits, LazyLogits, LogitScaling, SparseLogProbs, upload
from ..core.signals import FeatureKey, Signals
from ..errors import DistillError
from . import codec
from .codec import Ragged
from .example_keys import Example, example_generator
from .manifest import Manifest
from .reader import CachedExample
from .sampling import blocks_of, sample_by_inverse_cdf, systematic_points

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NO_ID = 1 << 40  # marks an empty slot
_WEIGHT_OFFSET_NATS = 64.0  # added to -log of the weight of a sample, which may be negative


class OutputHeadTensors(TypedDict):
    """The teacher's output head, which a cache of kind hidden stores once: the arguments of `LazyLogits`."""

    weight: Tensor
    bias: NotRequired[Tensor]
    scaling: LogitScaling


def encode_signals(
    teacher_signals: Signals, examples: Sequence[Example], manifest: Manifest, labels: Tensor
) -> list[CachedExample]:
    """Convert the teacher signals of a batch to stored examples.

    Args:
        teacher_signals: signals of all T target tokens: `LazyLogits` or `DenseLogits`, and the hidden states of the
            layers that the cache stores; for kind top_k also `SparseLogProbs` of k ascending ids with a tail.
        examples: the examples of the batch.
        manifest: the manifest with kind and options of the cache.
        labels: [T], whose log-probabilities are stored if the cache has the option `labels`.
    """
    logits = teacher_signals.logits
    if manifest.kind == "hidden":
        layers = [teacher_signals.features[FeatureKey("hidden", layer)] for layer in manifest.options["layers"]]
        assert isinstance(logits, LazyLogits)
        dtype = DTYPES[manifest.options["dtype"]]
        hidden, *further = [_row_bytes(tensor.to(dtype)) for tensor in (logits.hidden, *layers)]
        stored = []
        for rows in (example.target_slice for example in examples):
            further_bytes = [layer[rows].tobytes() for layer in further]
            stored.append(CachedExample(rows.stop - rows.start, 0, hidden[rows].tobytes(), further_bytes))
        return stored
    if isinstance(logits, SparseLogProbs):
        ragged = _stored_top_k(logits, labels if manifest.options.get("labels") else None)
        return [_encode_example(ragged, example.target_slice, manifest.vocab_size) for example in examples]
    assert isinstance(logits, LazyLogits | DenseLogits)
    if manifest.kind == "sampled":
        ragged = _sample(logits, examples, manifest)
    else:
        ragged = _top_k(logits, manifest, labels if manifest.options.get("labels") else None)
    return [_encode_example(ragged, example.target_slice, manifest.vocab_size) for example in examples]


def _row_bytes(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy()


def _encode_example(ragged: Ragged, targets: slice, vocab_size: int) -> CachedExample:
    bounds = np.concatenate([[0], np.cumsum(ragged.sizes, dtype=np.int64)])
    ids = slice(bounds[targets.start], bounds[targets.stop])
    example = Ragged(ragged.sizes[targets], ragged.ids[ids], ragged.values[ids], ragged.extra[targets])
    return CachedExample(len(example), len(example.ids), codec.encode(example, vocab_size), [])


def _top_k(source: LazyLogits | DenseLogits, manifest: Manifest, labels: Tensor | None) -> Ragged:
    k, temperature, parts = min(manifest.options["k"], manifest.vocab_size), float(manifest.temperature or 1.0), []
    for rows, logits in blocks_of(source):
        logits = logits if temperature == 1 else logits.div_(temperature)
        ids = logits.topk(k, dim=-1).indices.sort(dim=-1).values
        log_sum = torch.logsumexp(logits, -1, keepdim=True)
        log_probs = (logits.gather(-1, ids) - log_sum).double()
        if labels is not None:
            of_rows = labels[rows, None].to(ids.device)
            ids, log_probs = _with_labels(ids, log_probs, of_rows, (logits.gather(-1, of_rows) - log_sum).double())
        tail = (-torch.expm1(torch.logsumexp(log_probs, -1))).clamp(min=0).log()
        parts.append([tensor.cpu().numpy() for tensor in (ids, -log_probs, -tail)])
    token_ids, nats, tail_nats = (np.concatenate(column) for column in zip(*parts, strict=True))
    return _ragged_top_k(token_ids, nats, tail_nats)


def _stored_top_k(known: SparseLogProbs, labels: Tensor | None) -> Ragged:
    """Return log-probabilities that are known for k ids, such as those of a server, and for the labels if given."""
    assert known.log_tail is not None, "top-k log-probabilities have a tail"
    ids, log_probs, log_tail = known.ids, known.log_probs, known.log_tail
    if labels is not None:
        assert known.label_log_probs is not None, "a teacher of log-probabilities returns those of the labels"
        stored = log_probs.double()
        ids, log_probs = _with_labels(ids, stored, labels[:, None], known.label_log_probs.double()[:, None])
        log_tail = (-torch.expm1(torch.logsumexp(log_probs, -1))).clamp(min=0).log()
    return _ragged_top_k(*(tensor.cpu().numpy() for tensor in (ids, -log_probs, -log_tail)))


def _with_labels(ids: Tensor, log_probs: Tensor, labels: Tensor, label_log_probs: Tensor) -> tuple[Tensor, Tensor]:
    """Add the labels [T, 1] to the k ascending ids [T, k] of tokens and to their log-probabilities, [T, k + 1].

    Where the label is one of the k ids, the added slot has the id `_NO_ID`, which is larger than every id.
    """
    is_stored = (ids == labels).any(1, keepdim=True)
    added = labels.masked_fill(is_stored, _NO_ID)
    of_both = torch.cat([log_probs, label_log_probs.masked_fill(is_stored, -math.inf)], 1)
    sorted_ids, order = torch.cat([ids, added], 1).sort(1)
    return sorted_ids, of_both.gather(1, order)


def _ragged_top_k(token_ids: np.ndarray, nats: np.ndarray, tail_nats: np.ndarray) -> Ragged:
    """Store ids [T, K], ascending, the negative logs of their probabilities [T, K] and of that of all others [T].

    Slots with the id `_NO_ID` are left out.
    """
    is_id = token_ids != _NO_ID
    sizes = is_id.sum(1).astype(np.uint16)
    return Ragged(sizes, token_ids[is_id], codec.quantize_nats(nats[is_id]), codec.quantize_nats(tail_nats))


def _sample(source: LazyLogits | DenseLogits, examples: Sequence[Example], manifest: Manifest) -> Ragged:
    """Sample systematically; store the count of each distinct id, or its weight if the proposal has another T."""
    num_samples, proposal = manifest.options["samples_per_token"], float(manifest.options["proposal_temperature"])
    temperature = float(manifest.temperature or 1.0)
    seed = manifest.options["seed"]
    lengths = [example.target_slice.stop - example.target_slice.start for example in examples]
    generators = [example_generator(example.key, seed) for example in examples]
    pairs = zip(lengths, generators, strict=True)
    uniform = torch.cat([systematic_points(length, num_samples, generator) for length, generator in pairs])
    parts = []
    for rows, logits in blocks_of(source):
        block_points = uniform[rows].to(logits.device)
        if proposal == temperature:
            ids, log_proposal = sample_by_inverse_cdf(
                logits if temperature == 1 else logits.div_(temperature), block_points
            )
            log_q = log_proposal
        else:
            ids, log_proposal = sample_by_inverse_cdf(logits / proposal, block_points)
            logits = logits.div_(temperature)
            log_q = (logits.gather(1, ids) - torch.logsumexp(logits, -1, keepdim=True)).double()
        weight = log_q - log_proposal - math.log(num_samples)  # log of the weight of one sample
        expected = (weight.exp() * log_q).sum(1)
        parts.append([tensor.cpu().numpy() for tensor in (ids, weight, expected)])
    token_ids, weights, expectations = (np.concatenate(column) for column in zip(*parts, strict=True))
    first = np.diff(token_ids, axis=1, prepend=-1) != 0
    sizes = first.sum(1).astype(np.uint16)
    counts = np.diff(np.append(np.flatnonzero(first), first.size))
    nats = _WEIGHT_OFFSET_NATS - weights[first] - np.log(counts)
    values = counts if proposal == temperature else codec.quantize_nats(nats)
    return Ragged(sizes, token_ids[first], values, codec.quantize_nats(-expectations))


def decode_signals(
    stored: Sequence[CachedExample], manifest: Manifest, head: OutputHeadTensors, device: torch.device, ids: int
) -> Signals:
    """Convert stored examples to the teacher signals of their target tokens, concatenated over the examples.

    Args:
        stored: the stored examples.
        manifest: the manifest of the cache.
        head: weight, bias and scaling of the output head, for kind hidden.
        device: the device of the student.
        ids: V of the student; larger ids of the teacher are removed.

    Raises:
        DistillError: the bytes are not a result of the codec.
    """
    if manifest.kind == "hidden":
        width, dtype = int(manifest.width or 0), DTYPES[manifest.options["dtype"]]
        hidden = _concatenate([example.payload for example in stored], width, dtype, device)
        features = {
            FeatureKey("hidden", layer): _concatenate([example.layers[i] for example in stored], width, dtype, device)
            for i, layer in enumerate(manifest.options["layers"])
        }
        return Signals(LazyLogits(hidden.to(head["weight"].dtype) if hidden.is_cuda else hidden, **head), features)
    columns = (
        [example.payload for example in stored],
        [example.tokens for example in stored],
        [example.ids for example in stored],
    )
    return Signals(_sparse(codec.decode(*columns, manifest.vocab_size), manifest, device, ids))


def _sparse(ragged: Ragged, manifest: Manifest, device: torch.device, vocab_size: int) -> SparseLogProbs:
    ids, values, is_filled = codec.pad(ragged)
    options, temperature = manifest.options, float(manifest.temperature or 1.0)
    extra = -codec.dequantize_nats(ragged.extra)
    if manifest.kind == "top_k":
        logs = -codec.dequantize_nats(values)
    elif options["proposal_temperature"] == temperature:
        logs = np.log(np.maximum(values, 1) / options["samples_per_token"], dtype=np.float32)
    else:
        logs = _WEIGHT_OFFSET_NATS - codec.dequantize_nats(values)
    logs[~is_filled] = -np.inf
    token_ids, log_probs, per_token = (torch.from_numpy(array) for array in (ids, logs, extra))
    tail, expected = (per_token, None) if manifest.kind == "top_k" else (None, per_token)
    stored = SparseLogProbs(token_ids, log_probs, tail, temperature, expected, manifest.vocab_size)
    return stored.without_ids_from(vocab_size).to(device)


def _concatenate(parts: Sequence[bytes | pa.Buffer], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the hidden states [T, H] of several stored examples."""
    row_bytes = width * dtype.itemsize
    rows = torch.empty(sum(len(part) for part in parts) // row_bytes, width, dtype=dtype)
    flat, start = rows.view(torch.uint8).numpy().reshape(-1), 0
    for part in parts:
        flat[start : start + len(part)] = np.frombuffer(part, dtype=np.uint8)
        start += len(part)
    return upload(rows, device)


def check_kind(kind: str, teacher_signals: Signals) -> None:
    """Refuse a teacher whose signals cannot be stored in a cache of this kind.

    Raises:
        DistillError: the message gives the reason and the kinds that are possible.
    """
    if isinstance(teacher_signals.logits, SparseLogProbs):
        if kind == "top_k" and teacher_signals.logits.log_tail is not None:
            return
        raise DistillError(
            "The teacher returns log-probabilities of the most probable ids only, which a cache of kind top_k holds: "
            "use --kind top_k."
        )
    if not isinstance(teacher_signals.logits, LazyLogits | DenseLogits):
        raise DistillError(
            "The teacher has no dense logits, because it is a cache or several teachers: write the cache from a single "
            "model, a teacher of kind frozen."
        )
    if kind == "hidden" and not isinstance(teacher_signals.logits, LazyLogits):
        raise DistillError(
            "The teacher's logits are not computed from its last hidden states by a plain linear output head, so kind "
            "hidden cannot reproduce them: use --kind sampled or --kind top_k."
        )
