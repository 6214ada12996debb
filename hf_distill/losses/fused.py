"""The sweep over asked tokens: exact losses without logits, in four matrix products.

Chunk by chunk: logits of student and teacher into two buffers, every term of the objective and its gradient by the
student's logits (written over them), and from it the gradients of hidden states, weight and bias. All of this happens
in the forward; the backward scales. So the memory is that of one chunk, whatever the vocabulary and the tokens.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..core.logits import (
    DenseLogits,
    LazyLogits,
    LogitScaling,
    MultiTeacherLogits,
    SparseLogProbs,
    compute_dtype,
    grad_hidden_matmul,
    named_sources,
)
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from .analytic_gradients import BufferPool, LogitPair
from .objective import Term
from .token_metrics import PAIR_METRICS, STUDENT_METRICS, token_metrics

_CPU_CHUNK_BYTES = 150 * 2**20  # bytes of the two buffers on a CPU
CPU_CACHE_BYTES = 5 * 2**19  # bytes of a block of rows that a CPU's cache holds
MAX_TEMPORARIES = 10  # blocks [r, V] of temporaries that the closed forms take at most: js at T != 1, with statistics


@dataclass
class ChunkedLoss:
    """What to compute over the asked tokens, and what was found.

    teacher:      source of the teacher's logits, or of several by name; None where no term needs one
    targets:      T asked tokens
    terms:        of the objective
    statistics:   also `kl` (T = 1), `agreement` and the entropies and cross entropies of both models, for every
                  so manieth block of tokens: 0 for none, 1 for all; `measured` is 1 where they were taken, and they
                  are 0 elsewhere; of several teachers the first is compared with
    chunk_tokens: asked tokens a chunk; None: as many as the workspace holds
    num_items:    what the sum is divided by; None: T
    per_token:    name -> [T], filled by a run
    """

    teacher: DenseLogits | LazyLogits | SparseLogProbs | MultiTeacherLogits | None
    targets: Targets
    terms: list[Term]
    statistics: int = 0
    chunk_tokens: int | None = None
    num_items: Tensor | int | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self._scratch = BufferPool()
        items = self.targets.divisor(self.num_items)
        # Known on a CPU, so that gradients come out divided; elsewhere reading it would wait for the device.
        self._divisor_in_forward = 1 / float(items) if items.device.type == "cpu" else 1.0
        self._divisor_after = 1.0 if items.device.type == "cpu" else 1 / items
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise DistillError(f"chunk_tokens is {self.chunk_tokens}; it must be at least 1, or None.")

    def from_hidden(self, head: LazyLogits) -> Tensor:
        """The objective over asked tokens / num_items, [], of a student whose logits are made from hidden states."""
        needs_gradient = torch.is_grad_enabled()
        return self._divisor_after * _Fused.apply(
            head.hidden, head.weight, head.bias, head.scaling, needs_gradient, self
        )

    def from_logits(self, logits: Tensor) -> Tensor:
        """The same of a student whose logits [T, V] are there already."""
        needs_gradient = torch.is_grad_enabled() and logits.requires_grad
        return self._divisor_after * _Dense.apply(logits, needs_gradient, self)

    def run_chunks(self, student: DenseLogits | LazyLogits, on_gradient=None) -> Tensor:
        """Run over all chunks.

        Args:
            student: source of the student's logits.
            on_gradient: called with (rows, gradient [t, V]) for each chunk, the gradient by what the head itself puts
                out; a buffer that the next chunk overwrites. None: no gradient is computed.

        Returns:
            [] sum over asked tokens of the weighted terms, divided by num_items where that is known on the CPU.
        """
        count, device = len(self.targets), self.targets.labels.device
        teachers = named_sources(self.teacher)
        chunk = self.chunk_tokens or auto_chunk_tokens(student, teachers.values())
        dtype = compute_dtype(student.hidden if isinstance(student, LazyLogits) else student.values)
        own = _buffer(student, min(chunk, count), dtype)
        buffers = {name: _buffer(source, min(chunk, count), dtype) for name, source in teachers.items()}
        self._masked = any(_may_be_masked(source) for source in (student, *teachers.values()))
        self.per_token = {name: torch.zeros(count, dtype=dtype, device=device) for name in self._names()}
        self._number = 0
        for start in range(0, count, chunk):
            rows = slice(start, min(start + chunk, count))
            logits = student.project(rows, out=own)
            told = {name: _told(source, rows, buffers[name], logits.device) for name, source in teachers.items()}
            for block in _blocks(logits):
                heard = {name: _part(of_chunk, block) for name, of_chunk in told.items()}
                self._block(logits[block], heard, rows.start + block.start, student, on_gradient)
            if on_gradient is not None:
                on_gradient(rows, logits)
        total = torch.zeros((), dtype=dtype, device=device)
        for term in self.terms:
            if term.weight:
                total = total + term.weight * self.per_token[term.name].sum()
        return total * self._divisor_in_forward

    def _names(self) -> list[str]:
        """What `per_token` will hold, whatever is asked: every rank and batch must agree on it."""
        names = [term.name for term in self.terms]
        if self.statistics:
            names += STUDENT_METRICS
            names += (
                PAIR_METRICS
                if isinstance(next(iter(named_sources(self.teacher).values()), None), DenseLogits | LazyLogits)
                else ()
            )
        return names

    def _keep(self, name: str, start: int, values: Tensor) -> None:
        """Into one tensor for all tokens: small ones kept among a block's large temporaries would scatter the heap."""
        self.per_token[name][start : start + len(values)] = values.detach()

    def _block(self, logits, told, start, student, on_gradient) -> None:
        targets = self.targets.slice(slice(start, start + len(logits)))
        self._scratch.give_back()
        own = LogitPair(logits, None, targets.labels, self._scratch, self._masked)
        pairs = {name: own.beside(heard) for name, heard in told.items()}
        self._number += 1
        if self.statistics and (self._number - 1) % self.statistics == 0:
            first = next(iter(pairs.values()), None)
            for name, values in token_metrics(own, None if first is None or first.sparse else first).items():
                self._keep(name, start, values)
        said = Signals(DenseLogits(logits))
        heard = {name: Signals(DenseLogits(t) if isinstance(t, Tensor) else t) for name, t in told.items()}
        gradients = []
        for term in self.terms:
            pair = pairs.get(term.teacher) if term.loss.needs else own
            analytic_gradient = term.analytic_gradient(pair) is not None
            needs_gradient = on_gradient is not None and term.weight != 0
            asks = None if term.loss.needs else targets.has_label_mask
            if analytic_gradient or needs_gradient:  # a closed form is the shortest way to the values, too
                values, gradient, factor = term.loss_and_grad(said, heard.get(term.teacher), targets, pair)
                if needs_gradient:
                    gradient = gradient if asks is None else gradient.mul_(asks[:, None])
                    gradients.append((gradient, factor * self._divisor_in_forward))
            else:
                values = term(said, heard.get(term.teacher), targets)
            values = values if asks is None else values * asks
            self._keep(term.name, start, values)
        if on_gradient is not None:
            scaling = student.scaling if isinstance(student, LazyLogits) else LogitScaling()
            _write(logits, gradients, scaling)


def _write(logits: Tensor, gradients: list[tuple[Tensor, float]], scaling: LogitScaling) -> None:
    """The sum of (gradient [r, v], factor), by what the head puts out, over the logits [r, V]."""
    if not gradients:
        logits.zero_()
        return
    derivative = scaling.derivative(logits)
    gradients = sorted(gradients, key=lambda item: item[0].shape[1], reverse=True)
    for i, (gradient, factor) in enumerate(gradients):
        width = gradient.shape[1]
        if i == 0:
            torch.mul(gradient, factor, out=logits[:, :width])
            logits[:, width:] = 0
        else:
            logits[:, :width].add_(gradient, alpha=factor)
    if isinstance(derivative, Tensor) or derivative != 1.0:
        logits.mul_(derivative)


class _Fused(torch.autograd.Function):
    """hidden [T, H], weight [V, H], bias [V] or None -> the sum of the terms; gradients are taken in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, scaling, needs_gradient, job):
        head = LazyLogits(hidden, weight, bias, scaling)
        needs = [needs_gradient and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        dtype = compute_dtype(hidden, weight)
        shapes = [None if t is None else t.shape for t in (hidden, weight, bias)]
        ctx.gradients = [
            hidden.new_zeros(shape, dtype=dtype) if need else None for need, shape in zip(needs, shapes, strict=True)
        ]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        by_hidden, by_weight, by_bias = ctx.gradients

        def on_gradient(rows: slice, gradient: Tensor) -> None:
            if by_hidden is not None:
                grad_hidden_matmul(gradient, weight, by_hidden[rows])
            if by_weight is not None:
                by_weight.addmm_(gradient.t(), hidden[rows].to(dtype))
            if by_bias is not None:
                by_bias.add_(gradient.sum(0))

        with torch.autocast(hidden.device.type, enabled=False):
            return job.run_chunks(head, on_gradient if any(needs) else None)

    @staticmethod
    def backward(ctx, by_total):
        if ctx.gradients is None:
            raise RuntimeError("The fused head's gradients were used already: run the forward again.")
        gradients, ctx.gradients = ctx.gradients, None
        if by_total.device.type != "cpu" or by_total != 1:
            gradients = [g if g is None else g.mul_(by_total) for g in gradients]
        gradients = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*gradients, None, None, None)


class _Dense(torch.autograd.Function):
    """logits [T, V] -> the sum of the terms; the gradient is taken in the forward."""

    @staticmethod
    def forward(ctx, logits, needs_gradient, job):
        by_logits: Any = torch.empty_like(logits) if needs_gradient else None

        def on_gradient(rows: slice, gradient: Tensor) -> None:
            by_logits[rows] = gradient

        ctx.by_logits = by_logits
        with torch.autocast(logits.device.type, enabled=False):
            return job.run_chunks(DenseLogits(logits), on_gradient if needs_gradient else None)

    @staticmethod
    def backward(ctx, by_total):
        return ctx.by_logits * by_total, None, None


def auto_chunk_tokens(
    student: DenseLogits | LazyLogits, teachers: Iterable[DenseLogits | LazyLogits | SparseLogProbs]
) -> int:
    """How many asked tokens the buffers hold: 150 MiB on a CPU, an eighth of the free memory on a GPU."""
    values = student.hidden if isinstance(student, LazyLogits) else student.values
    itemsize = values.element_size() if values.dtype == torch.float64 else 4
    dense = [source.vocab_size for source in (student, *teachers) if not isinstance(source, SparseLogProbs)]
    row = itemsize * sum(dense)
    if values.is_cuda:
        free = torch.cuda.mem_get_info(values.device)[0] // 8
        return max(16, free // (row + MAX_TEMPORARIES * itemsize * student.vocab_size))  # blocks are whole chunks there
    return max(16, _CPU_CHUNK_BYTES // row)


def _buffer(source: DenseLogits | LazyLogits | SparseLogProbs, rows: int, dtype: torch.dtype) -> Tensor | None:
    """In the precision of the student's losses, whatever the teacher's."""
    if isinstance(source, SparseLogProbs):
        return None
    like = source.hidden if isinstance(source, LazyLogits) else source.values
    return like.new_empty(rows, source.vocab_size, dtype=dtype)


def _may_be_masked(source: DenseLogits | LazyLogits | SparseLogProbs) -> bool:
    """Whether logits may be -inf; those of a head without a bias are not."""
    if isinstance(source, SparseLogProbs):
        return False
    values = source.values if isinstance(source, DenseLogits) else source.bias
    return values is not None and bool((values == -torch.inf).any())


def _blocks(logits: Tensor) -> list[slice]:
    """Rows that fit the cache, as many for each thread; on a GPU all of them."""
    count, width = logits.shape
    threads = torch.get_num_threads()
    per_thread = max(1, CPU_CACHE_BYTES // (width * logits.element_size() * threads))
    size = count if logits.is_cuda else per_thread * threads
    return [slice(i, min(i + size, count)) for i in range(0, count, max(size, 1))]


def _told(
    source: DenseLogits | LazyLogits | SparseLogProbs, rows: slice, buffer: Tensor | None, device: torch.device
) -> Tensor | SparseLogProbs:
    return source.slice(rows) if isinstance(source, SparseLogProbs) else source.project(rows, out=buffer).to(device)


def _part(told: Tensor | SparseLogProbs, block: slice) -> Tensor | SparseLogProbs:
    return told.slice(block) if isinstance(told, SparseLogProbs) else told[block]
