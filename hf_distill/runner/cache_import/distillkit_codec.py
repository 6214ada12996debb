"""Decodes the compressed log-probabilities of DistillKit (arcee-ai/DistillKit, `distillkit/compression`, March 2026).

`Quantization`: the ids have ceil(log2 d) bits each, in one stream of bits, highest bit first. The bytes of the
log-probabilities are, in order: the first exact_k values in `exact_dtype`; the coefficients of a polynomial in the
index of the further values, in `term_dtype`; and for each bin of residuals its scale and its integers, `element_bits`
each, again as a stream of bits. With `delta_encoding` the values are differences of successive log-probabilities.

`LegacyQuantization`: the ids are packed into integers of 64 bits, lowest bits first, without crossing their bounds; the
values are numbers and coefficients.

Shape letters: P positions of a row, k ids of a position.
"""

import math
from typing import Annotated, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from ...errors import DistillError

_DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_Dtype = Literal["float16", "bfloat16", "float32", "float64"]
_Bits = Annotated[int, Field(ge=1, le=62)]


class ResidualBin(BaseModel, extra="forbid"):
    """Quantized residuals of some values: value = integer * scale."""

    scale_dtype: _Dtype
    element_bits: _Bits
    num_elements: Annotated[int, Field(ge=1)]


class Quantization(BaseModel, extra="forbid"):
    """The `logprob_compressor` of DistillKit.

    d: number of ids · k: values of a position · exact_k: values that are stored as they are · polynomial_terms:
    exponents, or sqrt or exp · normalize_t: whether the index of a value is scaled to 0 to 1. `error_diffusion` matters
    to the encoder only.
    """

    d: Annotated[int, Field(ge=2)]
    k: Annotated[int, Field(ge=1)]
    exact_k: Annotated[int, Field(ge=0)]
    exact_dtype: _Dtype = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: _Dtype = "float32"
    residual_bins: list[ResidualBin] = []
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        _check_exact(self.k, self.exact_k)
        if sum(each.num_elements for each in self.residual_bins) > self.k - self.exact_k:
            raise ValueError("residual_bins have more elements than the k - exact_k approximated values")
        return self

    def decode(self, packed_ids: np.ndarray, packed_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return ids [P, k] and log-probabilities [P, k].

        Args:
            packed_ids: [P, bytes] `bytepacked_indices`.
            packed_values: [P, bytes] `compressed_logprobs`.
        """
        bits, packed_ids, packed_values = _index_bits(self.d), _as_bytes(packed_ids), _as_bytes(packed_values)
        if packed_ids.shape[1] != -(-self.k * bits // 8):
            raise DistillError(
                f"has {packed_ids.shape[1]} bytes of ids for each position, and k = {self.k} ids below d = {self.d} "
                f"take {-(-self.k * bits // 8)}"
            )
        return unpack_bits(packed_ids, bits, self.k), self._decode_values(packed_values)

    def _decode_values(self, packed: np.ndarray) -> np.ndarray:
        """Return the log-probabilities [P, k] in float64."""
        reader, further = _ByteReader(packed), self.k - self.exact_k
        exact = reader.floats(self.exact_k, self.exact_dtype).double()
        approximate = torch.zeros(len(packed), further, dtype=torch.float64)
        if self.polynomial_terms:
            dtype = _DTYPES[self.term_dtype]
            coefficients = reader.floats(len(self.polynomial_terms), self.term_dtype)
            # The encoder subtracts the approximation in this dtype, so that it must be computed in it.
            approximate += (self._terms(further).to(dtype) * coefficients[:, None, :]).sum(-1).double()
        start = 0
        for residuals in self.residual_bins:
            scale = reader.floats(1, residuals.scale_dtype).double()
            integers = torch.from_numpy(reader.integers(residuals.num_elements, residuals.element_bits))
            centered = 2 * integers - 1 if residuals.element_bits == 1 else integers - 2 ** (residuals.element_bits - 1)
            approximate[:, start : start + residuals.num_elements] += centered * scale
            start += residuals.num_elements
        reader.finish()
        values = torch.cat([exact, approximate], -1)
        return (values.cumsum(-1) if self.delta_encoding else values).numpy()

    def _terms(self, count: int) -> Tensor:
        """Return the terms of the polynomial at the indices of the approximate values, [count, terms]."""
        points = torch.linspace(0, 1, count) if self.normalize_t else torch.arange(count, dtype=torch.float32)
        functions = {"sqrt": torch.sqrt, "exp": torch.exp}
        assert self.polynomial_terms is not None
        return torch.stack(
            [functions[t](points) if isinstance(t, str) else points**t for t in self.polynomial_terms], -1
        )


class LegacyQuantization(BaseModel, extra="forbid"):
    """The `legacy_logit_compression` of DistillKit: a polynomial in 1 / n, or n, for the n-th of the further values."""

    vocab_size: Annotated[int, Field(ge=2)]
    k: Annotated[int, Field(ge=1)]
    exact_k: Annotated[int, Field(ge=0)]
    polynomial_degree: Annotated[int, Field(ge=0)]
    invert_polynomial: bool = True
    with_sqrt_term: bool = False
    term_dtype: _Dtype = "float32"

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        _check_exact(self.k, self.exact_k)
        return self

    def decode(self, packed_ids: np.ndarray, exact: np.ndarray, coefficients: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return ids [P, k] and values [P, k]. The values are what was compressed: log-probabilities, or logits."""
        bits, further = _index_bits(self.vocab_size), self.k - self.exact_k
        per_integer, num_terms = 64 // bits, self.polynomial_degree + 1 + self.with_sqrt_term
        counts = (packed_ids.shape[1], exact.shape[1], coefficients.shape[1] if further else num_terms)
        expected = (-(-self.k // per_integer), self.exact_k, num_terms)
        if counts != expected:
            raise DistillError(
                "has {} integers of ids, {} exact values and {} coefficients for each position, and the configuration "
                "needs {}, {} and {}".format(*counts, *expected)
            )
        shifts = np.arange(per_integer, dtype=np.uint64) * np.uint64(bits)
        ids = (packed_ids.astype(np.uint64)[..., None] >> shifts) & np.uint64((1 << bits) - 1)
        ids = ids.reshape(len(packed_ids), -1)[:, : self.k].astype(np.int64)
        if not further:
            return ids, exact.astype(np.float64)
        numbers = np.arange(1, further + 1, dtype=np.float64)
        sign = -1 if self.invert_polynomial else 1
        terms = [numbers ** (sign * degree) for degree in range(self.polynomial_degree + 1)]
        terms += [np.sqrt(numbers)] if self.with_sqrt_term else []
        return ids, np.concatenate([exact.astype(np.float64), coefficients.astype(np.float64) @ np.stack(terms)], 1)


class _ByteReader:
    """Reads the bytes [P, bytes] of all positions from left to right."""

    def __init__(self, packed: np.ndarray):
        self._packed, self._start = packed, 0

    def _take(self, count: int) -> np.ndarray:
        end = self._start + count
        if end > self._packed.shape[1]:
            raise DistillError(
                f"has {self._packed.shape[1]} bytes of log-probabilities for each position, and the configuration "
                "needs more"
            )
        taken, self._start = self._packed[:, self._start : end], end
        return taken

    def floats(self, count: int, dtype: str) -> Tensor:
        """Return [P, count] numbers."""
        taken = torch.from_numpy(np.array(self._take(count * _DTYPES[dtype].itemsize)))
        return taken.view(_DTYPES[dtype]) if count else torch.empty(len(taken), 0, dtype=_DTYPES[dtype])

    def integers(self, count: int, bits: int) -> np.ndarray:
        """Return [P, count] integers of some bits, which begin and end at a byte."""
        return unpack_bits(self._take(-(-count * bits // 8)), bits, count)

    def finish(self) -> None:
        """Check that all bytes were read."""
        if self._start != self._packed.shape[1]:
            raise DistillError(
                f"has {self._packed.shape[1]} bytes of log-probabilities for each position, and the configuration "
                f"describes {self._start}"
            )


def unpack_bits(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return integers [P, count] from bytes [P, bytes]: a stream of bits, the highest bit of each integer first."""
    stream = np.unpackbits(packed, axis=1, count=count * bits).reshape(len(packed), count, bits)
    return stream.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _check_exact(k: int, exact_k: int) -> None:
    if exact_k > k:
        raise ValueError(f"exact_k is {exact_k} and k {k}: exact_k is at most k")


def _as_bytes(numbers: np.ndarray) -> np.ndarray:
    """Return bytes, which a data set may hold as larger integers."""
    if numbers.dtype != np.uint8 and ((numbers < 0) | (numbers > 255)).any():
        raise DistillError("has bytes above 255 or below 0")
    return numbers.astype(np.uint8)


def _index_bits(vocab_size: int) -> int:
    """Return ceil(log2 V), rounded as the format rounds it, in float32."""
    return math.ceil(torch.tensor(vocab_size, dtype=torch.float32).log2().item())
