"""Keys of examples in a cache: a hash of the content of an example.

An example is a row, or a document of a packed row. Its key depends on its tokens, the positions of its target tokens
and their labels, so an example with another text, mask or template is not found in the cache. The key does not depend
on padding, order, packing, epochs, workers or processes.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..core.logits import to_host
from ..core.row_values import ORIGIN, WEIGHT
from ..core.targets import SECOND_VIEW_KEYS, TEACHER_INDEX, Targets, token_documents
from ..core.teacher_inputs import is_teacher_key
from ..models.model_call import FLASH_ATTENTION_INPUTS

KEY_BYTES = 16
_MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # odd 64-bit numbers
_NOT_OTHER_INPUTS = {  # tensors that the key contains in another form, that follow from these, or that are no inputs
    *("input_ids", "attention_mask", "position_ids", "labels", "shift_labels", "has_labels", "source"),
    *("decoder_input_ids", "decoder_attention_mask", "num_items_in_batch", *SECOND_VIEW_KEYS),
    *(TEACHER_INDEX, WEIGHT, ORIGIN),
    *("seq_idx", *FLASH_ATTENTION_INPUTS),
}


@dataclass(frozen=True)
class Example:
    """The target tokens of one example in a batch.

    key:          [KEY_BYTES] key of the example
    target_slice: the contiguous part of the T target tokens of the batch that belongs to the example
    """

    key: bytes
    target_slice: slice


def batch_examples(inputs: dict, targets: Targets) -> list[Example]:
    """Return the examples of a batch that have target tokens, in the order of their target tokens.

    Args:
        inputs: a batch of the collator.
        targets: the target tokens of the batch.
    """
    others = {name: inputs[name].detach().cpu() for name in other_inputs(inputs)}
    mask = inputs.get("attention_mask")
    ids = inputs.get("input_ids", targets.labels.new_zeros(targets.shape[0], 0))
    if targets.shape == ids.shape:
        tensors = (ids, token_documents(inputs), targets.labels, targets.positions)
        token_ids, documents, labels, positions = to_host(*tensors)
        return _aligned_examples(token_ids, documents, labels, positions, others)
    is_visible = torch.ones_like(ids) if mask is None or mask.shape != ids.shape else mask != 0
    token_ids, is_visible, labels, positions = to_host(ids, is_visible, targets.labels, targets.positions)
    mask = mask.cpu() if others and mask is not None else None  # it selects the tokens of other inputs
    width = targets.shape[1] if len(targets.shape) > 1 else 1
    rows, examples = positions // width, []
    for start, end in _runs(rows):
        row = int(rows[start])
        tokens = token_ids[row][is_visible[row] != 0]
        parts = [_tensor_bytes(name, _select_row(value, row, mask)) for name, value in sorted(others.items())]
        key = example_key(tokens, positions[start:end] - row * width, labels[start:end], parts)
        examples.append(Example(key, slice(start, end)))
    return examples


def batch_checksum(inputs: Mapping[str, Tensor]) -> Tensor:
    """Return a checksum of the ids, masks, positions and labels of a batch, [1] on their device: a sum of hashes."""
    total = torch.zeros(1, dtype=torch.long, device=next(iter(inputs.values())).device)
    for number, name in enumerate(("input_ids", "attention_mask", "position_ids", "labels"), 1):
        values = inputs.get(name)
        if isinstance(values, Tensor) and not values.is_floating_point():
            places = torch.arange(values.numel(), device=values.device) * 4 + number
            hashes = values.reshape(-1).long() * _MULTIPLIERS[0] + places * _MULTIPLIERS[1] + values.shape[-1]
            for multiplier in _MULTIPLIERS:
                hashes = (hashes ^ (hashes >> 31)) * multiplier
            total = total + hashes.sum()
    return total


def other_inputs(inputs: Mapping[str, object]) -> list[str]:
    """Return the names of the model inputs of a batch other than token ids, such as images or `token_type_ids`."""
    return sorted(
        name
        for name, value in inputs.items()
        if name not in _NOT_OTHER_INPUTS and not is_teacher_key(name) and isinstance(value, Tensor)
    )


def _select_row(value: Tensor, row: int, mask: Tensor | None) -> Tensor:
    values = value[row]
    if mask is not None and value.shape[: mask.dim()] == mask.shape:
        values = values[mask[row] != 0]
    return values


def _tensor_bytes(name: str, value: Tensor) -> bytes:
    value = value.float() if value.is_floating_point() else value.long()
    return f"{name} {tuple(value.shape)} ".encode() + np.ascontiguousarray(value.numpy()).tobytes()


def _aligned_examples(
    ids: np.ndarray, documents: np.ndarray, labels: np.ndarray, positions: np.ndarray, others: Mapping[str, Tensor]
) -> list[Example]:
    """Return the examples of models whose logits have the positions of their tokens: rows, or documents inside rows."""
    width = documents.shape[1]
    ids, flat = ids.reshape(-1), documents.reshape(-1)
    document_ids = positions // width * (flat.max(initial=0) + 1) + flat[positions]  # unique for row and document
    edges = np.flatnonzero(np.diff(flat) | (np.arange(1, len(flat)) % width == 0)) + 1
    spans = np.concatenate([[0], edges, [len(flat)]])
    examples = []
    for start, end in _runs(document_ids):
        span = np.searchsorted(spans, positions[start], side="right") - 1
        first, last = spans[span], spans[span + 1]
        parts = []
        for name, value in sorted(others.items()):
            is_per_token, is_per_row = value.shape[:2] == documents.shape, len(value) == len(documents)
            row_value = value[first // width] if is_per_row else value
            parts.append(_tensor_bytes(name, value.flatten(0, 1)[first:last] if is_per_token else row_value))
        key = example_key(ids[first:last], positions[start:end] - first, labels[start:end], parts)
        examples.append(Example(key, slice(start, end)))
    return examples


def _runs(numbers: np.ndarray) -> list[tuple[int, int]]:
    """Return the start and end of each run of equal numbers."""
    edges = np.flatnonzero(np.diff(numbers)) + 1
    bounds = [0, *edges.tolist(), len(numbers)]
    return list(pairwise(bounds)) if len(numbers) else []


def example_key(tokens: np.ndarray, positions: np.ndarray, labels: np.ndarray, others: Sequence[bytes] = ()) -> bytes:
    """Return the key of an example.

    Args:
        tokens: [S] token ids of the example.
        positions: [T] positions of the target tokens, counted from the first token of the example.
        labels: [T] labels of the target tokens.
        others: bytes of the other model inputs.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES)
    for part in (tokens, positions, labels):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(part, dtype="<i8").tobytes())
    for other in others:
        digest.update(len(other).to_bytes(8, "little") + other)
    return digest.digest()


def example_generator(key: bytes, seed: int) -> torch.Generator:
    """Return the random generator of an example; it does not depend on the batch, process or attempt."""
    mixed = hashlib.blake2b(key, digest_size=8, key=seed.to_bytes(8, "little")).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def fingerprint(keys: Sequence[bytes]) -> str:
    """Return a checksum of a set of examples."""
    return hashlib.sha256(b"".join(sorted({*keys}))).hexdigest()
