"""What a batch's examples are called in a cache: by their own content, wherever they stand and whatever is beside them.

An example is a row, or a document of a packed row. Its key tells its tokens, which of them are asked and for which
labels, so that a cache can say nothing about other text, other masks or another template; padding, order, packing,
epochs, workers and processes do not matter.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.targets import SECOND_VIEW_KEYS, Targets

KEY = 16  # bytes
_NOT_READ = {  # what of a batch is in the key by itself, follows from it, or is no input
    *("input_ids", "attention_mask", "position_ids", "labels", "shift_labels", "has_labels", "source"),
    *("decoder_input_ids", "decoder_attention_mask", "num_items_in_batch", *SECOND_VIEW_KEYS),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"),
}


@dataclass(frozen=True)
class Example:
    """Some of the asked tokens of a batch that belong together.

    key:   [KEY] bytes
    asked: which of T; in order, and without gaps
    """

    key: bytes
    asked: slice


def batch_examples(inputs: dict, targets: Targets) -> list[Example]:
    """The examples of a batch that ask something, in the order of their asked tokens.

    Args:
        inputs: the collator's batch.
        targets: its asked tokens.
    """
    labels, positions = targets.labels.cpu().numpy(), targets.positions.cpu().numpy()
    others = {name: inputs[name] for name in other_inputs(inputs)}
    ids = inputs["input_ids"].cpu().numpy() if "input_ids" in inputs else np.zeros((targets.shape[0], 0), dtype="<i8")
    if targets.shape == ids.shape:
        documents = targets.feature_positions(inputs, causal=True).documents
        assert documents is not None
        return _aligned(ids.reshape(-1), documents.cpu().numpy(), labels, positions, others)
    mask = inputs.get("attention_mask")
    real = np.ones_like(ids) if mask is None or tuple(mask.shape) != ids.shape else mask.cpu().numpy()
    rows, width = targets.rows.cpu().numpy(), targets.shape[1] if len(targets.shape) > 1 else 1
    found = []
    for start, end in _runs(rows):
        row = int(rows[start])
        tokens = ids[row][real[row] != 0]
        parts = [_part(name, _of_row(value, row, mask)) for name, value in sorted(others.items())]
        key = example_key(tokens, positions[start:end] - row * width, labels[start:end], parts)
        found.append(Example(key, slice(start, end)))
    return found


def other_inputs(inputs: Mapping[str, Any]) -> list[str]:
    """Names of the tensors of a batch that a model reads besides token ids, such as images or `token_type_ids`."""
    return sorted(name for name, value in inputs.items() if name not in _NOT_READ and isinstance(value, Tensor))


def _of_row(value: Tensor, row: int, mask: Tensor | None) -> Tensor:
    own = value[row]
    if mask is not None and value.shape[: mask.dim()] == mask.shape:
        own = own[mask[row] != 0]
    return own


def _part(name: str, value: Tensor) -> bytes:
    value = value.detach().cpu()
    value = value.float() if value.is_floating_point() else value.long()
    return f"{name} {tuple(value.shape)} ".encode() + np.ascontiguousarray(value.numpy()).tobytes()


def _aligned(
    ids: np.ndarray, documents: np.ndarray, labels: np.ndarray, positions: np.ndarray, others: Mapping[str, Tensor]
) -> list[Example]:
    """Of models whose predictions stand where their tokens do: rows, and documents inside them."""
    width = documents.shape[1]
    flat = documents.reshape(-1)
    place = positions // width * (flat.max(initial=0) + 1) + flat[positions]  # row and document of each asked token
    edges = np.flatnonzero(np.diff(flat) | (np.arange(1, len(flat)) % width == 0)) + 1
    spans = np.concatenate([[0], edges, [len(flat)]])
    found = []
    for start, end in _runs(place):
        which = np.searchsorted(spans, positions[start], side="right") - 1
        first, last = spans[which], spans[which + 1]
        parts = []
        for name, value in sorted(others.items()):
            by_token, by_row = value.shape[:2] == documents.shape, len(value) == len(documents)
            own = value.flatten(0, 1)[first:last] if by_token else value[first // width] if by_row else value
            parts.append(_part(name, own))
        key = example_key(ids[first:last], positions[start:end] - first, labels[start:end], parts)
        found.append(Example(key, slice(start, end)))
    return found


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    edges = np.flatnonzero(np.diff(numbers)) + 1
    bounds = [0, *edges.tolist(), len(numbers)]
    return list(pairwise(bounds)) if len(numbers) else []


def example_key(tokens: np.ndarray, asked: np.ndarray, labels: np.ndarray, others: Sequence[bytes] = ()) -> bytes:
    """The key of an example.

    Args:
        tokens: [S] that the model sees.
        asked: [T] where predictions are asked, counted from the example's first token.
        labels: [T] what is to be predicted there.
        others: of other inputs that the model sees.
    """
    digest = hashlib.blake2b(digest_size=KEY)
    for part in (tokens, asked, labels):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    for other in others:
        digest.update(len(other).to_bytes(8, "little") + other)
    return digest.digest()


def example_seed(key: bytes, seed: int) -> torch.Generator:
    """Random numbers that belong to an example: the same in whichever batch, process or attempt it comes."""
    mixed = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def fingerprint(keys: Sequence[bytes]) -> str:
    """One name for a set of examples."""
    return hashlib.sha256(b"".join(sorted({*keys}))).hexdigest()
