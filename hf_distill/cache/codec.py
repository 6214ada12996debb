"""Encodes the teacher signals of one example as bytes, and decodes many examples at once.

sampled, top_k: per token the ascending ids as differences, one integer per id, and one integer per token. The integers
                of 1 to 4 bytes are split into byte planes, lowest bytes first, and compressed by zstd: most high bytes
                are 0.
hidden:         the values [T, H] in row order without compression, so that they are read without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..errors import DistillError

STEPS_PER_NAT = 128  # resolution of stored log-probabilities
_ZSTD = pa.Codec("zstd", compression_level=3)


@dataclass(frozen=True)
class Ragged:
    """A different number of ids for each of T tokens, with an integer per id and per token.

    sizes:  [T] number of ids of each token, at most 65535
    ids:    [sum of sizes] ids, ascending within a token
    values: [sum of sizes] per id: its number of samples, or -log q in steps of 1 / STEPS_PER_NAT nats
    extra:  [T] per token, in steps of 1 / STEPS_PER_NAT nats: top_k: -log of the mass of the other ids; sampled: the
            expectation of -log q under the samples
    """

    sizes: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    extra: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)


def quantize_nats(nats: np.ndarray) -> np.ndarray:
    """Quantize nats from 0 to 511 to steps of 1 / STEPS_PER_NAT; larger values and infinity become 511."""
    return np.rint(np.clip(np.nan_to_num(nats, posinf=511.0), 0.0, 511.0) * STEPS_PER_NAT).astype(np.uint16)


def dequantize_nats(steps: np.ndarray) -> np.ndarray:
    """Return nats in float32."""
    return steps.astype(np.float32) / STEPS_PER_NAT


def encode(ragged: Ragged, vocab_size: int) -> bytes:
    """Encode one example.

    Args:
        ragged: ids and values of the T target tokens of the example.
        vocab_size: V, which determines the bytes of an id before compression.
    """
    starts = np.cumsum(ragged.sizes, dtype=np.int64) - ragged.sizes
    differences = np.diff(ragged.ids, prepend=0)
    differences[starts[ragged.sizes > 0]] = ragged.ids[starts[ragged.sizes > 0]]
    planes = [
        _planes(ragged.sizes, 2),
        _planes(differences, _id_bytes(vocab_size)),
        _planes(ragged.values, 2),
        _planes(ragged.extra, 2),
    ]
    return _ZSTD.compress(b"".join(planes), asbytes=True)


def decode(payloads: Sequence[pa.Buffer | bytes], tokens: Sequence[int], ids: Sequence[int], vocab_size: int) -> Ragged:
    """Decode several examples and concatenate them.

    Args:
        payloads: results of `encode`.
        tokens: T of each example.
        ids: number of ids of each example, the sum of its sizes.
        vocab_size: V.

    Raises:
        DistillError: the bytes are not a result of `encode`.
    """
    id_bytes = _id_bytes(vocab_size)
    parts = [_decode(*example, id_bytes) for example in zip(payloads, tokens, ids, strict=True)]
    sizes, differences, values, extra = (np.concatenate(column) for column in zip(*parts, strict=True))
    running, ends = np.cumsum(differences, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)
    before = np.concatenate([[0], running])[ends - sizes]
    return Ragged(sizes, running - np.repeat(before, sizes), values, extra)


def pad(ragged: Ragged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return ids [T, K], values [T, K] and a mask [T, K] of the entries that exist; K is the largest size."""
    max_ids = int(ragged.sizes.max(initial=1))
    is_filled = np.arange(max_ids) < ragged.sizes[:, None]
    ids, values = np.zeros(is_filled.shape, dtype=np.int64), np.zeros(is_filled.shape, dtype=ragged.values.dtype)
    ids[is_filled], values[is_filled] = ragged.ids, ragged.values
    return ids, values, is_filled


def _decode(payload: pa.Buffer | bytes, tokens: int, ids: int, id_bytes: int) -> list[np.ndarray]:
    counts, widths = (tokens, ids, ids, tokens), (2, id_bytes, 2, 2)
    num_bytes = sum(count * width for count, width in zip(counts, widths, strict=True))
    try:
        raw = _ZSTD.decompress(payload, decompressed_size=num_bytes)
    except (OSError, pa.ArrowException) as error:
        raise DistillError(
            f"An example of the cache cannot be decompressed ({error}): write the cache again."
        ) from None
    flat, start, columns = np.frombuffer(raw, dtype=np.uint8), 0, []
    for count, size in zip(counts, widths, strict=True):
        planes = flat[start : start + count * size].reshape(size, count)
        start += count * size
        numbers = planes[0].astype(np.uint16 if size == 2 else np.int64)
        for byte, plane in enumerate(planes[1:], 1):
            numbers |= plane.astype(numbers.dtype) << (8 * byte)
        columns.append(numbers)
    return columns


def _planes(numbers: np.ndarray, width: int) -> bytes:
    """Return integers below 256^width as byte planes: the lowest bytes of all, then the second bytes, and so on."""
    little_endian = np.ascontiguousarray(numbers, dtype="<u4")
    return np.ascontiguousarray(little_endian.view(np.uint8).reshape(-1, 4)[:, :width].T).tobytes()


def _id_bytes(vocab_size: int) -> int:
    return 2 if vocab_size <= 1 << 16 else 3
