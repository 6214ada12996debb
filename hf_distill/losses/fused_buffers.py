"""Sizes of the chunks and blocks of the fused loss. They depend on shapes only.

A size that followed the free memory would differ between ranks, steps and resumed runs, which would then sum in
different orders, and would shrink to a few rows once PyTorch's allocator holds the memory of the GPU.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

_CPU_CHUNK_BYTES = 150 * 2**20  # bytes of the logits of a chunk, of all models
_CPU_MIN_TOKENS = 16
CPU_CACHE_BYTES = 5 * 2**19  # bytes of a block of rows that a CPU's cache holds
_GPU_CHUNK_BYTES = 2**30  # bytes of the logits of a chunk, of all models
_GPU_MIN_TOKENS = 1024  # with fewer, the gradient of the output head is limited by memory bandwidth
_GPU_TOKEN_MULTIPLE = 128  # rows of the tiles of matrix products
GPU_BLOCK_BYTES = 64 * 2**20  # bytes of a block of rows: large enough to occupy a GPU, and its temporaries stay small
MAX_TEMPORARIES = 11  # most tensors [r, V] that analytic gradients allocate for a block: js at T != 1 with statistics
_GPU_ROW_MULTIPLE = 16  # elements: rows of matrices then start at addresses that products read at full speed


def auto_chunk_tokens(vocab_sizes: Iterable[int], itemsize: int, device_type: str) -> int:
    """Return the number of target tokens in a chunk.

    On a CPU the logits of a chunk take 150 MiB, and a chunk has at least 16 tokens. On a GPU they take about 1 GiB, and
    a chunk has a multiple of 128 tokens and at least 1024.

    Args:
        vocab_sizes: V of each model whose logits are computed.
        itemsize: bytes of a logit.
        device_type: type of the device.
    """
    token_bytes = itemsize * sum(vocab_sizes)
    if device_type == "cpu":
        return max(_CPU_MIN_TOKENS, _CPU_CHUNK_BYTES // token_bytes)
    multiples = round(_GPU_CHUNK_BYTES / (token_bytes * _GPU_TOKEN_MULTIPLE))
    return max(_GPU_MIN_TOKENS, multiples * _GPU_TOKEN_MULTIPLE)


def block_rows(row_bytes: int, device_type: str) -> int:
    """Return the number of rows of a chunk for which losses and gradients are computed at a time.

    On a CPU their logits fit its cache, with as many rows for each thread.

    Args:
        row_bytes: bytes of the logits of one target token.
        device_type: type of the device.
    """
    if device_type != "cpu":
        return max(1, GPU_BLOCK_BYTES // row_bytes)
    num_threads = torch.get_num_threads()
    return max(1, CPU_CACHE_BYTES // (row_bytes * num_threads)) * num_threads


def gradient_has_buffer(uses_kernel: bool, gradient_itemsize: int, itemsize: int) -> bool:
    """Return whether the gradient of a chunk's logits has a separate buffer; otherwise it overwrites the logits.

    The Triton kernel needs one, because its warps read logits of a row while others write the gradient of that row.

    Args:
        uses_kernel: whether the Triton kernel computes the chunk.
        gradient_itemsize: bytes of an element of the gradient.
        itemsize: bytes of a logit.
    """
    return uses_kernel or gradient_itemsize != itemsize


def new_row_buffer(like: Tensor, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Allocate a buffer [rows, width] on the device of a tensor; on a GPU the rows are aligned, whatever the width."""
    if like.device.type == "cpu":
        return like.new_empty(rows, width, dtype=dtype)
    stride = -(-width // _GPU_ROW_MULTIPLE) * _GPU_ROW_MULTIPLE
    return like.new_empty(rows, stride, dtype=dtype)[:, :width]
