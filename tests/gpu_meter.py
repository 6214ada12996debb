"""Meter of the fused loss at full size, without a GPU.

Meta tensors have a shape and a dtype and no data. `GpuMeter` makes the code under test take them for CUDA tensors, and
counts what their operators would do on a GPU: kernels, matrix products by dtype, bytes and the peak of the memory. An
operation that reads a number of the device on the host raises an error, because a meta tensor has none.

Times are estimates and lower bounds: products at `H100.flops`, memory at `H100.bandwidth`, nothing overlaps.
"""

import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_distill.core import matmul
from hf_distill.core.logits import LazyLogits, LogitScaling
from hf_distill.core.targets import Targets
from hf_distill.losses.fused import ChunkedLoss
from hf_distill.losses.kernels import selection
from hf_distill.losses.kernels.row_losses import RowLosses
from hf_distill.losses.objective import objective

GIB = 2**30

# Operators that start no kernel: views, and allocations without a value.
_FREE = {
    "view", "slice", "t", "detach", "select", "unsqueeze", "squeeze", "alias", "as_strided", "expand", "transpose",
    "_unsafe_view", "lift_fresh", "empty", "new_empty", "empty_like", "new_empty_strided", "empty_strided", "set_",
}  # fmt: skip
_PRODUCTS = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2)}  # name -> positions of the two factors
_WRITE_ONLY = {
    "zero_",
    "fill_",
    "zeros",
    "new_zeros",
    "zeros_like",
    "full",
    "full_like",
    "ones",
    "ones_like",
    "new_ones",
}
_FEW_ELEMENTS = {"gather", "scatter_add_", "index", "index_put_"}  # read and write a few elements of each row
_SOFTMAX_READS = 3  # a row of a large vocabulary does not fit into shared memory: maximum, sum, result


@dataclass(frozen=True)
class Gpu:
    """Assumed speed of a GPU.

    flops:     dtype of the factors -> floating point operations per second of a large product
    bandwidth: bytes per second of its memory
    """

    flops: dict[torch.dtype, float]
    bandwidth: float


H100 = Gpu({torch.bfloat16: 800e12, torch.float16: 800e12, torch.float32: 67e12}, 3.35e12)


@dataclass
class Products:
    """The matrix products of one signature."""

    calls: int = 0
    flop: float = 0
    seconds: float = 0


@dataclass
class GpuMeter(TorchDispatchMode):
    """Counts the operators that run on meta tensors.

    launches:          operator -> number of kernels; an operator is one kernel that reads its inputs and writes its
                       outputs
    products:          (dtype of the first factor, of the second, of the result) -> their products
    elementwise_bytes: bytes that all kernels but the products read and write
    peak_bytes:        most bytes that were allocated at a time, without those allocated before the meter
    """

    gpu: Gpu = H100
    launches: Counter = field(default_factory=Counter)
    products: dict[tuple[torch.dtype, torch.dtype, torch.dtype], Products] = field(default_factory=dict)
    elementwise_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self):
        super().__init__()
        self._live: dict[int, int] = {}  # storage -> bytes that were allocated under the meter
        self._live_bytes = 0

    def __hash__(self):
        return id(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        read_kwargs = {k: v for k, v in kwargs.items() if k != "out"}
        inputs = [leaf for leaf in tree_leaves((args, read_kwargs)) if isinstance(leaf, Tensor)]
        for tensor in inputs:
            self._register(tensor, 0)  # allocated before the meter, unless it is known
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in outputs:
            self._register(tensor, tensor.untyped_storage().nbytes())
        if name in _FREE or all(tensor.device.type == "cpu" for tensor in (*inputs, *outputs)):
            return result
        self.launches[name] += 1
        if name in _PRODUCTS:
            factors = [args[i] for i in _PRODUCTS[name]]
            self._multiply(*factors, outputs[0])
        elif name not in _FEW_ELEMENTS:
            read = inputs[1:] if name == "copy_" else [] if name in _WRITE_ONLY else inputs
            reads = _SOFTMAX_READS if name == "_softmax" else 1
            self.elementwise_bytes += reads * _num_bytes(read) + _num_bytes(outputs)
        return result

    def count(self, name: str, num_bytes: int) -> None:
        """Count a kernel that is no operator of PyTorch."""
        self.launches[name] += 1
        self.elementwise_bytes += num_bytes

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        entry = self.products.setdefault((a.dtype, b.dtype, out.dtype), Products())
        flop = 2 * a.shape[0] * a.shape[1] * b.shape[1]
        entry.calls += 1
        entry.flop += flop
        # An accumulated result is read, too. The first chunk's need not be: a lower bound ignores it.
        entry.seconds += max(flop / self.gpu.flops[a.dtype], _num_bytes([a, b, out]) / self.gpu.bandwidth)

    def _register(self, tensor: Tensor, num_bytes: int) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if tensor.device.type == "cpu" or key in self._live:
            return
        self._live[key] = num_bytes
        self._live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._live_bytes -= self._live.pop(key)

    @property
    def product_seconds(self) -> float:
        """Estimated seconds of the products."""
        return sum(product.seconds for product in self.products.values())

    @property
    def elementwise_seconds(self) -> float:
        """Estimated seconds of all other kernels."""
        return self.elementwise_bytes / self.gpu.bandwidth

    @property
    def seconds(self) -> float:
        """Estimated seconds of the loss, forward and backward."""
        return self.product_seconds + self.elementwise_seconds


def _num_bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def meta_as_cuda(free_gib: float = 30.0) -> Iterator[Counter]:
    """Let the code under test take meta tensors for CUDA tensors.

    Args:
        free_gib: what `torch.cuda.mem_get_info` returns as free.

    Yields:
        the number of calls of "mem_get_info".
    """
    calls: Counter = Counter()

    def mem_get_info(device=None):
        calls["mem_get_info"] += 1
        return int(free_gib * GIB), 80 * GIB

    autocast, real = torch.autocast, torch.cuda.mem_get_info
    torch.Tensor.is_cuda = property(lambda tensor: tensor.device.type == "meta")
    torch.cuda.mem_get_info = mem_get_info
    torch.autocast = lambda device_type, **options: autocast(
        "cuda" if device_type == "meta" else device_type, **options
    )
    try:
        yield calls
    finally:
        del torch.Tensor.is_cuda
        torch.cuda.mem_get_info, torch.autocast = real, autocast


@dataclass(frozen=True)
class Problem:
    """One call of the fused loss, forward and backward; the defaults are a student and a teacher of 8B parameters."""

    tokens: int = 8192
    vocab: int = 131072
    hidden: int = 4096
    teacher_vocab: int | None = None  # None: vocab
    teacher_hidden: int = 4096
    divergence: str | dict = "forward_kl"
    temperature: float = 2.0
    alpha: float = 0.5
    statistics_every: int = 4
    chunk_tokens: int | None = None
    dtype: torch.dtype = torch.bfloat16
    is_frozen: bool = False  # the student's output head
    has_bias: bool = False  # the student's output head
    softcap: float | None = None  # of both models

    def floor_seconds(self, gpu: Gpu = H100) -> float:
        """Estimated seconds of the matrix products that exact gradients need: three, or four with the head's."""
        student, teacher = self.vocab * self.hidden, (self.teacher_vocab or self.vocab) * self.teacher_hidden
        return 2 * self.tokens * ((2 if self.is_frozen else 3) * student + teacher) / gpu.flops[self.dtype]

    def measure(self, free_gib: float = 30.0, has_triton: bool = False) -> tuple[GpuMeter, Counter]:
        """Run the fused loss on meta tensors.

        Args:
            free_gib: what `torch.cuda.mem_get_info` returns as free.
            has_triton: whether Triton is installed. Its kernel is not run, but counted with the bytes that it declares.

        Returns:
            (the meter, the calls of "mem_get_info").
        """
        meter = GpuMeter()

        def run(row_losses, outputs, labels, label_mask, out, gradient, first_token):
            meter.count("row_kernel", row_losses.bytes_moved(outputs, gradient))

        with (
            meta_as_cuda(free_gib) as calls,
            mock.patch.object(
                selection, "triton_problem", return_value="" if has_triton else "Triton is not installed"
            ),
            mock.patch.object(RowLosses, "run", run),
        ):
            matmul._supports_float32_output(torch.device("meta"), self.dtype)  # its trial is not counted
            student, chunked_loss = self._loss()
            gc.collect()
            with meter:
                chunked_loss.from_hidden(student).backward()
        return meter, calls

    def _loss(self) -> tuple[LazyLogits, ChunkedLoss]:
        def make(*shape: int, dtype: torch.dtype = self.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        weight = make(self.vocab, self.hidden).requires_grad_(not self.is_frozen)
        bias = make(self.vocab).requires_grad_(not self.is_frozen) if self.has_bias else None
        scaling = LogitScaling(softcap=self.softcap)
        student = LazyLogits(make(self.tokens, self.hidden).requires_grad_(), weight, bias, scaling)
        teacher_weight = make(self.teacher_vocab or self.vocab, self.teacher_hidden)
        teacher = LazyLogits(make(self.tokens, self.teacher_hidden), teacher_weight, None, scaling)
        ids = [make(self.tokens, dtype=torch.long) for _ in range(3)]
        targets = Targets(*ids, torch.Size((4, self.tokens // 4)))
        terms = [term for term in objective(self.alpha, self.temperature, self.divergence) if term.weight]
        num_items = make(dtype=torch.long)
        return student, ChunkedLoss(teacher, targets, terms, self.statistics_every, self.chunk_tokens, num_items)


SHAPES = {
    "8B to 8B": Problem(),
    "70B to 8B": Problem(vocab=128256, teacher_hidden=8192),
    "7B to 0.5B": Problem(vocab=151936, hidden=896, teacher_hidden=3584),
}
