"""The fused loss: the exact objective and its gradients, chunk by chunk, without logits for all target tokens at once.

For each chunk of target tokens, in the forward:

1. `student_chunk` [t, V_s] and `teacher_chunks` [t, V_t] are computed into one buffer for each model.
2. The chunk is divided into blocks [r, V] of rows that fit a CPU's cache (on a GPU the block is the chunk).
3. For each block, every term of the objective gives its values [r] and its gradient with respect to the student logits,
   from an analytic formula or from autograd. The weighted sum of the gradients overwrites the student logits.
4. The chunk's gradient is multiplied with the output head's weight and with the hidden states: it is added to the
   gradients of hidden states, weight and bias.

The backward only scales these gradients by the incoming gradient. The memory is that of one chunk, whatever the size of
the vocabulary and the number of target tokens. Each chunk costs four matrix products: the logits of both models and the
gradients of hidden states and weight. Because the loss leaves through the output head's forward, DDP, FSDP2 and ZeRO-3
gather the head's weight and reduce its gradient as usual.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

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
    logits_by_teacher,
)
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError
from .analytic_gradients import BlockLogits, BufferPool
from .objective import Term
from .token_metrics import PAIR_METRICS, STUDENT_METRICS, token_metrics

_CPU_CHUNK_BYTES = 150 * 2**20  # bytes of the buffers of a chunk on a CPU
CPU_CACHE_BYTES = 5 * 2**19  # bytes of a block of rows that a CPU's cache holds
MAX_TEMPORARIES = 10  # most tensors [r, V] that analytic gradients allocate for a block: js at T != 1 with statistics

LogitSource: TypeAlias = DenseLogits | LazyLogits | SparseLogProbs
LogitChunk: TypeAlias = Tensor | SparseLogProbs
OnGradient: TypeAlias = Callable[[slice, Tensor], None]


@dataclass
class ChunkedLoss:
    """The loss on the logits of one batch, computed chunk by chunk.

    teacher_logits:   teacher logits, or those of several teachers by name; None if no term reads them
    targets:          T target tokens
    terms:            of the objective
    statistics_every: also compute `kl` (T = 1), `agreement` (top-1) and the entropies and cross entropies of both
                      models, on every n-th block (0 disables, 1 is every block). `measured` is 1 for the tokens of
                      these blocks; for other tokens all of them are 0. Of several teachers, the first is compared
    chunk_tokens:     target tokens in a chunk; None for as many as `auto_chunk_tokens` allows
    num_items:        divisor of the sum, number of target tokens of the global batch; None for T
    per_token:        name -> [T], set by `run_chunks`: the terms (scaled, not weighted) and the statistics
    """

    teacher_logits: DenseLogits | LazyLogits | SparseLogProbs | MultiTeacherLogits | None
    targets: Targets
    terms: list[Term]
    statistics_every: int = 0
    chunk_tokens: int | None = None
    num_items: Tensor | int | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        self._buffer_pool = BufferPool()
        divisor = self.targets.divisor(self.num_items)
        # A CPU tensor can be read here, so gradients are divided in the forward; reading a GPU's would wait for it.
        self._inverse_divisor_in_forward = 1 / float(divisor) if divisor.device.type == "cpu" else 1.0
        self._inverse_divisor_after_forward = 1.0 if divisor.device.type == "cpu" else 1 / divisor
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise DistillError(
                f"chunk_tokens is {self.chunk_tokens}; give a number of tokens of at least 1, or None to choose it "
                "from the memory."
            )

    def from_hidden(self, student: LazyLogits) -> Tensor:
        """Return the objective over target tokens / num_items, [], computed chunk by chunk.

        Args:
            student: hidden states [T, H] of the student and its output head, which get gradients.
        """
        needs_gradient = torch.is_grad_enabled()
        return self._inverse_divisor_after_forward * _LossFromHidden.apply(
            student.hidden, student.weight, student.bias, student.scaling, needs_gradient, self
        )

    def from_logits(self, student: DenseLogits) -> Tensor:
        """Return the objective over target tokens / num_items, [], for materialized student logits.

        Args:
            student: logits [T, V] of the student, which get a gradient.
        """
        needs_gradient = torch.is_grad_enabled() and student.values.requires_grad
        return self._inverse_divisor_after_forward * _LossFromLogits.apply(student.values, needs_gradient, self)

    def run_chunks(self, student: DenseLogits | LazyLogits, on_gradient: OnGradient | None = None) -> Tensor:
        """Compute all chunks.

        Args:
            student: the student's logits.
            on_gradient: called for each chunk with (rows, gradient [t, V] with respect to the output of the student's
                output head). The next chunk overwrites the gradient. None computes no gradients.

        Returns:
            [], the sum over target tokens of the weighted terms; divided by num_items if that is known on the CPU.
        """
        num_tokens, device = len(self.targets), self.targets.labels.device
        teachers = logits_by_teacher(self.teacher_logits)
        chunk_tokens = self.chunk_tokens or auto_chunk_tokens(student, teachers.values())
        buffer_rows = min(chunk_tokens, num_tokens)
        dtype = compute_dtype(student.hidden if isinstance(student, LazyLogits) else student.values)
        student_buffer = _new_buffer(student, buffer_rows, dtype)
        teacher_buffers = {name: _new_buffer(teacher, buffer_rows, dtype) for name, teacher in teachers.items()}
        self._may_be_masked = any(_may_be_masked(source) for source in (student, *teachers.values()))
        self.per_token = {name: torch.zeros(num_tokens, dtype=dtype, device=device) for name in self._metric_names()}
        self._num_blocks = 0
        for start in range(0, num_tokens, chunk_tokens):
            rows = slice(start, min(start + chunk_tokens, num_tokens))
            student_chunk = student.project(rows, out=student_buffer)
            teacher_chunks = {
                name: _teacher_chunk(teacher, rows, teacher_buffers[name], student_chunk.device)
                for name, teacher in teachers.items()
            }
            for block_rows in _cache_blocks(student_chunk):
                teacher_blocks = {name: _slice(chunk, block_rows) for name, chunk in teacher_chunks.items()}
                gradients = self._run_block(
                    student_chunk[block_rows], teacher_blocks, start + block_rows.start, on_gradient is not None
                )
                if on_gradient is not None:
                    scaling = student.scaling if isinstance(student, LazyLogits) else LogitScaling()
                    _overwrite_with_gradient(student_chunk[block_rows], gradients, scaling)
            if on_gradient is not None:
                gradient = student_chunk  # overwritten block by block
                on_gradient(rows, gradient)
        total = torch.zeros((), dtype=dtype, device=device)
        for term in self.terms:
            if term.weight:
                total = total + term.weight * self.per_token[term.name].sum()
        return total * self._inverse_divisor_in_forward

    def _metric_names(self) -> list[str]:
        """Return the keys of `per_token`, which must not depend on the batch: all ranks have to agree on them."""
        names = [term.name for term in self.terms]
        if self.statistics_every:
            names += STUDENT_METRICS
            first_teacher = next(iter(logits_by_teacher(self.teacher_logits).values()), None)
            names += PAIR_METRICS if isinstance(first_teacher, DenseLogits | LazyLogits) else ()
        return names

    def _store(self, name: str, start: int, values: Tensor) -> None:
        """Copy the values of a block into the one tensor for all tokens.

        Small tensors that outlive a block's large temporaries would fragment the heap.
        """
        self.per_token[name][start : start + len(values)] = values.detach()

    def _run_block(
        self, student_block: Tensor, teacher_blocks: Mapping[str | None, LogitChunk], start: int, needs_gradient: bool
    ) -> list[tuple[Tensor, float]]:
        """Store the terms and statistics of a block of rows.

        Args:
            student_block: [r, V_s].
            teacher_blocks: name -> [r, V_t], or sparse log-probabilities of r tokens.
            start: index of the block's first target token.
            needs_gradient: whether gradients are computed.

        Returns:
            for each term with a weight: (gradient [r, v] with respect to the student logits, factor).
        """
        targets = self.targets.slice(slice(start, start + len(student_block)))
        self._buffer_pool.release_all()
        student_only = BlockLogits(student_block, None, targets.labels, self._buffer_pool, self._may_be_masked)
        blocks = {name: student_only.with_teacher(teacher_block) for name, teacher_block in teacher_blocks.items()}
        self._num_blocks += 1
        if self.statistics_every and (self._num_blocks - 1) % self.statistics_every == 0:
            first = next(iter(blocks.values()), None)
            metrics = token_metrics(student_only, None if first is None or first.sparse_teacher else first)
            for name, values in metrics.items():
                self._store(name, start, values)
        student_signals = Signals(DenseLogits(student_block))
        teacher_signals = {
            name: Signals(DenseLogits(teacher_block) if isinstance(teacher_block, Tensor) else teacher_block)
            for name, teacher_block in teacher_blocks.items()
        }
        gradients = []
        for term in self.terms:
            block = blocks.get(term.teacher) if term.loss.compares else student_only
            label_mask = None if term.loss.compares else targets.label_mask
            needs_term_gradient = needs_gradient and term.weight != 0
            # An analytic gradient is the cheapest way to the values too.
            if needs_term_gradient or term.analytic_gradient(block) is not None:
                values, gradient, factor = term.loss_and_grad(
                    student_signals, teacher_signals.get(term.teacher), targets, block
                )
                if needs_term_gradient:
                    gradient = gradient if label_mask is None else gradient.mul_(label_mask[:, None])
                    gradients.append((gradient, factor * self._inverse_divisor_in_forward))
            else:
                values = term(student_signals, teacher_signals.get(term.teacher), targets)
            self._store(term.name, start, values if label_mask is None else values * label_mask)
        return gradients


def _overwrite_with_gradient(
    student_block: Tensor, gradients: list[tuple[Tensor, float]], scaling: LogitScaling
) -> None:
    """Overwrite logits with the gradient with respect to the output of the student's output head.

    Args:
        student_block: [r, V].
        gradients: (gradient [r, v] with respect to the first v logits, factor); they are summed.
        scaling: applied to the head's output by the model; its derivative is multiplied in.
    """
    if not gradients:
        student_block.zero_()
        return
    derivative = scaling.derivative(student_block)
    gradients = sorted(gradients, key=lambda item: item[0].shape[1], reverse=True)
    for i, (gradient, factor) in enumerate(gradients):
        width = gradient.shape[1]
        if i == 0:
            torch.mul(gradient, factor, out=student_block[:, :width])
            student_block[:, width:] = 0
        else:
            student_block[:, :width].add_(gradient, alpha=factor)
    if isinstance(derivative, Tensor) or derivative != 1.0:
        student_block.mul_(derivative)


class _LossFromHidden(torch.autograd.Function):
    """hidden [T, H], weight [V, H], bias [V] or None -> sum of the terms, []; gradients are computed in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, scaling, needs_gradient, chunked_loss):
        student = LazyLogits(hidden, weight, bias, scaling)
        needs_grad = [needs_gradient and t is not None and t.requires_grad for t in (hidden, weight, bias)]
        dtype = compute_dtype(hidden, weight)
        shapes = [None if t is None else t.shape for t in (hidden, weight, bias)]
        ctx.gradients = [
            hidden.new_zeros(shape, dtype=dtype) if need else None
            for need, shape in zip(needs_grad, shapes, strict=True)
        ]
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, weight, bias)]
        grad_hidden, grad_weight, grad_bias = ctx.gradients

        def on_gradient(rows: slice, gradient: Tensor) -> None:
            if grad_hidden is not None:
                grad_hidden_matmul(gradient, weight, grad_hidden[rows])
            if grad_weight is not None:
                grad_weight.addmm_(gradient.t(), hidden[rows].to(dtype))
            if grad_bias is not None:
                grad_bias.add_(gradient.sum(0))

        with torch.autocast(hidden.device.type, enabled=False):
            return chunked_loss.run_chunks(student, on_gradient if any(needs_grad) else None)

    @staticmethod
    def backward(ctx, grad_total):
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of the fused loss were already used by an earlier backward: run the forward again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        if grad_total.device.type != "cpu" or grad_total != 1:
            gradients = [g if g is None else g.mul_(grad_total) for g in gradients]
        gradients = [g if g is None else g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)]
        return (*gradients, None, None, None)


class _LossFromLogits(torch.autograd.Function):
    """student logits [T, V] -> sum of the terms, []; the gradient is computed in the forward."""

    @staticmethod
    def forward(ctx, student_values, needs_gradient, chunked_loss):
        grad_logits: Any = torch.empty_like(student_values) if needs_gradient else None

        def on_gradient(rows: slice, gradient: Tensor) -> None:
            grad_logits[rows] = gradient

        ctx.grad_logits = grad_logits
        with torch.autocast(student_values.device.type, enabled=False):
            return chunked_loss.run_chunks(DenseLogits(student_values), on_gradient if needs_gradient else None)

    @staticmethod
    def backward(ctx, grad_total):
        return ctx.grad_logits * grad_total, None, None


def auto_chunk_tokens(student: DenseLogits | LazyLogits, teachers: Iterable[LogitSource]) -> int:
    """Return the number of target tokens in a chunk, from the memory.

    The buffers of a chunk take 150 MiB on a CPU, and with their temporaries an eighth of the free memory on a GPU.

    Args:
        student: the student's logits.
        teachers: the logits of all teachers.
    """
    values = student.hidden if isinstance(student, LazyLogits) else student.values
    itemsize = values.element_size() if values.dtype == torch.float64 else 4
    widths = [source.vocab_size for source in (student, *teachers) if not isinstance(source, SparseLogProbs)]
    token_bytes = itemsize * sum(widths)
    if values.is_cuda:
        free_bytes = torch.cuda.mem_get_info(values.device)[0] // 8
        # A block is the chunk on a GPU, so the temporaries of a block count too.
        return max(16, free_bytes // (token_bytes + MAX_TEMPORARIES * itemsize * student.vocab_size))
    return max(16, _CPU_CHUNK_BYTES // token_bytes)


def _new_buffer(source: LogitSource, rows: int, dtype: torch.dtype) -> Tensor | None:
    """Allocate a buffer [rows, V] for logits, in the precision of the loss; None for a sparse teacher."""
    if isinstance(source, SparseLogProbs):
        return None
    like = source.hidden if isinstance(source, LazyLogits) else source.values
    return like.new_empty(rows, source.vocab_size, dtype=dtype)


def _may_be_masked(source: LogitSource) -> bool:
    """Whether some logits may be -inf; those of an output head without a bias never are."""
    if isinstance(source, SparseLogProbs):
        return False
    values = source.values if isinstance(source, DenseLogits) else source.bias
    return values is not None and bool((values == -torch.inf).any())


def _cache_blocks(logits: Tensor) -> list[slice]:
    """Divide the rows of a chunk into blocks that fit the CPU's cache, with as many rows for each thread.

    On a GPU one block holds all rows.
    """
    count, width = logits.shape
    num_threads = torch.get_num_threads()
    rows_per_thread = max(1, CPU_CACHE_BYTES // (width * logits.element_size() * num_threads))
    size = count if logits.is_cuda else rows_per_thread * num_threads
    return [slice(i, min(i + size, count)) for i in range(0, count, max(size, 1))]


def _teacher_chunk(teacher: LogitSource, rows: slice, buffer: Tensor | None, device: torch.device) -> LogitChunk:
    """Return the teacher logits of a chunk, [t, V_t], on the student's device; a sparse teacher stays sparse."""
    if isinstance(teacher, SparseLogProbs):
        return teacher.slice(rows)
    return teacher.project(rows, out=buffer).to(device)


def _slice(chunk: LogitChunk, block_rows: slice) -> LogitChunk:
    """Return some rows of the teacher logits of a chunk."""
    return chunk.slice(block_rows) if isinstance(chunk, SparseLogProbs) else chunk[block_rows]
