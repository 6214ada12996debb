"""What a teacher said of one example's asked tokens, as bytes; and back, for many examples at once.

sampled, top_k: each token's ids ascending, as differences; a number for each id; a number for each token. Whole numbers
                of 1 to 4 bytes are cut into planes, lowest bytes first, and compressed by zstd: most high bytes are 0.
hidden:         the values as they are, [T, H] row by row, so that they are read without a copy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from ..errors import DistillError

STEPS_PER_NAT = 128  # steps a nat of a stored log-probability
_ZSTD = pa.Codec("zstd", compression_level=3)


@dataclass(frozen=True)
class Ragged:
    """Some ids of each token, with whole numbers that belong to them.

    sizes:  [T] how many ids a token has, at most 65535
    ids:    [sum of sizes] ascending within a token
    values: [sum of sizes] of each id: draws, or -log p in steps of 1 / GRID nats
    extra:  [T] of each token: -log of what its ids leave, or of what the draws weigh, in steps of 1 / GRID nats
    """

    sizes: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    extra: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)


def quantize_nats(nats: np.ndarray) -> np.ndarray:
    """Numbers from 0 to 511 nats, in steps of 1 / GRID; what is beyond is 511, and so is infinity."""
    return np.rint(np.clip(np.nan_to_num(nats, posinf=511.0), 0.0, 511.0) * STEPS_PER_NAT).astype(np.uint16)


def dequantize_nats(steps: np.ndarray) -> np.ndarray:
    """Nats in float32."""
    return steps.astype(np.float32) / STEPS_PER_NAT


def encode(found: Ragged, vocab_size: int) -> bytes:
    """Bytes of one example.

    Args:
        found: of its asked tokens.
        vocab_size: V; says how many bytes an id takes before compression.
    """
    starts = np.cumsum(found.sizes, dtype=np.int64) - found.sizes
    steps = np.diff(found.ids, prepend=0)
    steps[starts[found.sizes > 0]] = found.ids[starts[found.sizes > 0]]
    planes = [
        _planes(found.sizes, 2),
        _planes(steps, _width(vocab_size)),
        _planes(found.values, 2),
        _planes(found.extra, 2),
    ]
    return _ZSTD.compress(b"".join(planes), asbytes=True)


def decode(payloads: Sequence[pa.Buffer | bytes], tokens: Sequence[int], ids: Sequence[int], vocab_size: int) -> Ragged:
    """What `encode` was given, of several examples one after another.

    Args:
        payloads: of `encode`.
        tokens: T of each.
        ids: sum of sizes of each.
        vocab_size: V.

    Raises:
        DistillError: bytes that `encode` did not write.
    """
    width = _width(vocab_size)
    parts = [_decode(*of_one, width) for of_one in zip(payloads, tokens, ids, strict=True)]
    sizes, steps, values, extra = (np.concatenate(column) for column in zip(*parts, strict=True))
    running, ends = np.cumsum(steps, dtype=np.int64), np.cumsum(sizes, dtype=np.int64)
    before = np.concatenate([[0], running])[ends - sizes]
    return Ragged(sizes, running - np.repeat(before, sizes), values, extra)


def padded(found: Ragged) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As rectangles: ids [T, K], values [T, K], and which of them there are [T, K]; K is the most that a token has."""
    most = int(found.sizes.max(initial=1))
    there = np.arange(most) < found.sizes[:, None]
    ids, values = np.zeros(there.shape, dtype=np.int64), np.zeros(there.shape, dtype=found.values.dtype)
    ids[there], values[there] = found.ids, found.values
    return ids, values, there


def _decode(payload: pa.Buffer | bytes, tokens: int, ids: int, width: int) -> list[np.ndarray]:
    counts, widths = (tokens, ids, ids, tokens), (2, width, 2, 2)
    try:
        raw = _ZSTD.decompress(payload, decompressed_size=sum(n * w for n, w in zip(counts, widths, strict=True)))
    except (OSError, pa.ArrowException) as error:
        raise DistillError(
            f"An example of the cache cannot be decompressed ({error}): write the cache again."
        ) from None
    flat, start, found = np.frombuffer(raw, dtype=np.uint8), 0, []
    for count, size in zip(counts, widths, strict=True):
        planes = flat[start : start + count * size].reshape(size, count)
        start += count * size
        numbers = planes[0].astype(np.uint16 if size == 2 else np.int64)
        for byte, plane in enumerate(planes[1:], 1):
            numbers |= plane.astype(numbers.dtype) << (8 * byte)
        found.append(numbers)
    return found


def _planes(numbers: np.ndarray, width: int) -> bytes:
    """Whole numbers below 256^width as bytes: all lowest ones, then all second ones, and so on."""
    whole = np.ascontiguousarray(numbers, dtype="<u4")
    return np.ascontiguousarray(whole.view(np.uint8).reshape(-1, 4)[:, :width].T).tobytes()


def _width(vocab_size: int) -> int:
    return 2 if vocab_size <= 1 << 16 else 3
