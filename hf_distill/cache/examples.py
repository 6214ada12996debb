"""What a batch's examples are called in a cache: by their own content, wherever they stand and whatever is beside them.

An example is a row, or a document of a packed row. Its key tells its tokens, which of them are asked and for which
labels, so that a cache can say nothing about other text, other masks or another template; padding, order, packing,
epochs, workers and processes do not matter.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from ..signals import Targets

KEY = 16  # bytes


@dataclass(frozen=True)
class Example:
    """Some of the asked tokens of a batch that belong together.

    key:   [KEY] bytes
    asked: which of T; in order, and without gaps
    """

    key: bytes
    asked: slice


def examples_of(inputs: dict, targets: Targets) -> list[Example]:
    """The examples of a batch that ask something, in the order of their asked tokens.

    Args:
        inputs: the collator's batch, with `input_ids` [B, S].
        targets: its asked tokens.
    """
    labels, positions = targets.labels.cpu().numpy(), targets.positions.cpu().numpy()
    ids = inputs["input_ids"].cpu().numpy()
    if targets.shape == ids.shape:
        documents = targets.tokens(inputs, causal=True).documents
        assert documents is not None
        return _aligned(ids.reshape(-1), documents.cpu().numpy(), labels, positions)
    mask = inputs.get("attention_mask")
    real = np.ones_like(ids) if mask is None else mask.cpu().numpy()
    rows, width = targets.rows.cpu().numpy(), targets.shape[1] if len(targets.shape) > 1 else 1
    found = []
    for start, end in _runs(rows):
        row = int(rows[start])
        tokens = ids[row][real[row] != 0]
        found.append(Example(key_of(tokens, positions[start:end] - row * width, labels[start:end]), slice(start, end)))
    return found


def _aligned(ids: np.ndarray, documents: np.ndarray, labels: np.ndarray, positions: np.ndarray) -> list[Example]:
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
        key = key_of(ids[first:last], positions[start:end] - first, labels[start:end])
        found.append(Example(key, slice(start, end)))
    return found


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    edges = np.flatnonzero(np.diff(numbers)) + 1
    bounds = [0, *edges.tolist(), len(numbers)]
    return list(pairwise(bounds)) if len(numbers) else []


def key_of(tokens: np.ndarray, asked: np.ndarray, labels: np.ndarray) -> bytes:
    """The key of an example.

    Args:
        tokens: [S] that the model sees.
        asked: [T] where predictions are asked, counted from the example's first token.
        labels: [T] what is to be predicted there.
    """
    digest = hashlib.blake2b(digest_size=KEY)
    for part in (tokens, asked, labels):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    return digest.digest()


def seed_of(key: bytes, seed: int) -> torch.Generator:
    """Random numbers that belong to an example: the same in whichever batch, process or attempt it comes."""
    mixed = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def fingerprint(keys: Sequence[bytes]) -> str:
    """One name for a set of examples."""
    return hashlib.sha256(b"".join(sorted({*keys}))).hexdigest()
