"""The fused loss: the exact objective and its gradients, chunk by chunk, without logits for all target tokens at once.

For each chunk of target tokens, in the forward:

1. `student_chunk` [t, V_s] and `teacher_chunks` [t, V_t] are computed into one buffer for each model.
2. The chunk is divided into blocks [r, V] of rows that fit a CPU's cache, or whose temporaries are small on a GPU.
3. For each block, every term of the objective gives its values [r] and its gradient with respect to the student logits,
   from an analytic formula or from autograd. The weighted sum of the gradients overwrites the student logits, or is
   rounded to bf16 in a buffer of its own where bf16 matrices are multiplied to float32 (see `core/matmul.py`).
   On a GPU, one Triton kernel computes steps 2 and 3 of the whole chunk for most losses (see `kernels/selection.py`).
4. The chunk's gradient is multiplied with the output head's weight and with the hidden states: it is added to the
   gradients of hidden states, weight and bias, in float32 or better.

The backward only scales these gradients by the incoming gradient. The memory is that of one chunk, whatever the size of
the vocabulary and the number of target tokens. Each chunk costs four matrix products: the logits of both models and the
gradients of hidden states and weight. Because the loss leaves through the output head's forward, DDP, FSDP2 and ZeRO-3
gather the head's weight and reduce its gradient as usual.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits, CrossTokenizerLogits, aligned_only, cut_rows
from ..core.logits import DenseLogits, LazyLogits, LogitScaling, compute_dtype
from ..core.loss_kinds import CHUNK_LOG_PROBS, FIRST_LOGITS
from ..core.matmul import accumulate_matmul, rounds_gradient_to_bf16
from ..core.signals import Signals
from ..core.targets import Targets
from ..core.teacher_logits import MultiTeacherLogits, OneTeacherLogits, logits_by_teacher
from ..errors import DistillError
from .analytic_gradients import BlockLogits, BufferPool
from .chunk_metrics import CHUNK_METRICS, CHUNK_TOTALS, chunk_metrics, chunk_totals
from .fused_buffers import block_rows
from .kernels.row_losses import RowLosses
from .kernels.selection import uses_row_kernel
from .logit_chunks import (
    LogitBuffers,
    LogitChunk,
    LogitSource,
    is_sparse,
    may_be_masked,
    reference_tensor,
    scaling_of,
    slice_chunk,
    tokens_per_chunk,
)
from .objective import Term
from .output_types import DISTRIBUTION_OUTPUTS, OutputType

OnGradient: TypeAlias = Callable[[slice, Tensor], None]


@dataclass
class ChunkedLoss:
    """The loss on the logits of one batch, computed chunk by chunk.

    teacher_logits:   teacher logits, or those of several teachers by name; None if no term reads them
    targets:          T target tokens
    terms:            of the objective
    statistics_every: also compute `kl` (T = 1), `agreement` (top-1) and the entropies and cross entropies of both
                      models, for every n-th target token (0 disables, 1 is every token). `measured` is 1 for these
                      tokens; for others all of them are 0. Of several teachers, the first is compared
    chunk_tokens:     target tokens in a chunk; None for as many as `auto_chunk_tokens` returns
    num_items:        divisor of the sum, number of target tokens of the global batch; None for T
    per_token:        name -> [T], set by `run_chunks`: the terms (scaled, not weighted) and the statistics
    output_type:      what the outputs of the models are, which decides the statistics
    """

    teacher_logits: OneTeacherLogits | MultiTeacherLogits | None
    targets: Targets
    terms: Sequence[Term]
    statistics_every: int = 0
    chunk_tokens: int | None = None
    num_items: Tensor | int | None = None
    per_token: dict[str, Tensor] = field(default_factory=dict)
    output_type: OutputType = DISTRIBUTION_OUTPUTS

    def __post_init__(self) -> None:
        self._buffer_pool = BufferPool()
        divisor = self.targets.divisor(self.num_items)
        # A CPU tensor can be read here, so gradients are divided in the forward; reading a GPU's would wait for it.
        self._inverse_divisor_in_forward = 1 / float(divisor) if divisor.device.type == "cpu" else 1.0
        self._inverse_divisor_after_forward = 1.0 if divisor.device.type == "cpu" else 1 / divisor
        if self.chunk_tokens is not None and self.chunk_tokens < 1:
            raise DistillError(
                f"chunk_tokens is {self.chunk_tokens}; give a number of tokens of at least 1, or None to choose it "
                "from the sizes of the vocabularies."
            )

    def from_hidden(self, student_logits: LazyLogits) -> Tensor:
        """Return the objective over target tokens / num_items, [], computed chunk by chunk.

        Args:
            student_logits: hidden states [T, H] of the student and its output head, which get gradients.
        """
        needs_gradient = torch.is_grad_enabled()
        return self._inverse_divisor_after_forward * _LossFromHidden.apply(
            student_logits.hidden,
            student_logits.weight if student_logits.master_weight is None else student_logits.master_weight,
            student_logits.bias,
            student_logits.detach(),
            needs_gradient,
            self,
        )

    def from_logits(self, student_logits: DenseLogits) -> Tensor:
        """Return the objective over target tokens / num_items, [], for materialized student logits.

        Args:
            student_logits: logits [T, V] of the student, which get a gradient.
        """
        needs_gradient = torch.is_grad_enabled() and student_logits.values.requires_grad
        return self._inverse_divisor_after_forward * _LossFromLogits.apply(student_logits.values, needs_gradient, self)

    def token_weights(self) -> Tensor | None:
        """Return the factors of the losses of the target tokens in the order of the rows of `run_chunks`, [T]."""
        return self.targets.weights

    def gradient_unit(self) -> float:
        """Return the number by which the gradient of the logits is divided before it is rounded to bf16.

        It is the weight of the cross entropy / num_items: the -1 in softmax - onehot(label) is then exact in bf16.
        After another divisor, the same relative error in all rows would not average out. Without cross entropy it is
        1 / num_items.
        """
        for term in self.terms:
            label_share = 1 - term.options.get("label_smoothing", 0.0)
            if term.weight and label_share and not term.loss.compares:
                return self._inverse_divisor_in_forward * term.weight * label_share
        return self._inverse_divisor_in_forward

    def run_chunks(
        self,
        student_logits: DenseLogits | LazyLogits,
        on_gradient: OnGradient | None = None,
        gradient_dtype: torch.dtype | None = None,
        gradient_unit: float = 1.0,
    ) -> Tensor:
        """Compute all chunks.

        Args:
            student_logits: the student's logits.
            on_gradient: called for each chunk with (rows, gradient [t, V] with respect to the output of the student's
                output head), which must still be multiplied by `token_weights`. The next chunk overwrites the
                gradient. None computes no gradients.
            gradient_dtype: dtype of the gradient; None for that of the logits.
            gradient_unit: number by which the gradient is divided before it is rounded to its dtype; see
                `gradient_unit`.

        Returns:
            [], the sum over target tokens of the weighted terms; divided by num_items if that is known on the CPU.
        """
        num_tokens, device = len(self.targets), self.targets.labels.device
        sources = logits_by_teacher(self.teacher_logits)
        for source in (student_logits, *sources.values()):
            if isinstance(source, LazyLogits):
                source.check_weight()
        dtype = compute_dtype(reference_tensor(student_logits))
        chunk_tokens = self._whole_groups(self.chunk_tokens or tokens_per_chunk(student_logits, sources, dtype))
        teacher_logits = self.logits_by_teacher(chunk_tokens)
        chunk_ranges = cut_rows(num_tokens, chunk_tokens, aligned_only(teacher_logits))
        self._gradient_factor = self._inverse_divisor_in_forward / gradient_unit
        self._may_be_masked = any(may_be_masked(source) for source in (student_logits, *teacher_logits.values()))
        row_losses = self._row_losses(student_logits)
        names = self._metric_names()
        table = torch.zeros(len(names), num_tokens, dtype=dtype, device=device)
        order = row_losses.names if row_losses else names
        self.per_token = {name: table[order.index(name)] for name in names}
        buffer_rows = max((rows.stop - rows.start for rows in chunk_ranges), default=0)
        buffers = LogitBuffers.allocate(student_logits, teacher_logits, buffer_rows, dtype)
        if on_gradient:
            buffers.allocate_gradient(student_logits, buffer_rows, gradient_dtype or dtype, row_losses is not None)
        for rows in chunk_ranges:
            gradient: Any = None if on_gradient is None else buffers.gradient[: rows.stop - rows.start]
            if row_losses:
                targets = self.targets.slice(rows)
                outputs = buffers.head_outputs(student_logits, teacher_logits, rows, device)
                row_losses.run(outputs, targets.labels, targets.label_mask, table[:, rows], gradient, rows.start)
            else:
                student_chunk, teacher_chunks = buffers.logits(student_logits, teacher_logits, rows)
                self._run_chunk(student_chunk, teacher_chunks, rows.start, gradient, scaling_of(student_logits))
            if on_gradient is not None:
                on_gradient(rows, gradient)
        self._store_chunk_totals(next(iter(teacher_logits.values()), None))
        return self._weighted_total(dtype)

    def _store_chunk_totals(self, first_teacher: LogitSource | None) -> None:
        """Store the sums over chunks of text, if the first teacher has another tokenizer and they are requested."""
        if isinstance(first_teacher, AlignedLogits) and "chunk_bytes" in self.per_token:
            for name, values in chunk_totals(first_teacher, self.per_token["student_ce"]).items():
                self.per_token[name].copy_(values)

    def _weighted_total(self, dtype: torch.dtype) -> Tensor:
        """Multiply the values of the terms by the weights of their tokens, and return the weighted sum of all, []."""
        total = torch.zeros((), dtype=dtype, device=self.targets.labels.device)
        for term in self.terms:
            if self.targets.weights is not None:
                self.per_token[term.name].mul_(self.targets.weights)
            if term.weight:
                total = total + term.weight * self.per_token[term.name].sum()
        return total * self._inverse_divisor_in_forward

    def logits_by_teacher(self, max_rows: int) -> dict[str | None, LogitSource]:
        """Return the logits of each teacher; of one of another tokenizer, the chunks with what the terms read of it.

        Args:
            max_rows: largest number of rows of logits to materialize at a time.
        """
        result: dict[str | None, LogitSource] = {}
        for name, source in logits_by_teacher(self.teacher_logits).items():
            if isinstance(source, CrossTokenizerLogits):
                kinds = {kind for term in self.terms if term.teacher == name for kind in term.loss.compares}
                result[name] = source.aligned(
                    needs_first_logits=FIRST_LOGITS in kinds or self.statistics_every > 0,
                    needs_log_probs=CHUNK_LOG_PROBS in kinds or self.statistics_every == 1,
                    max_rows=max_rows,
                )
            else:
                result[name] = source
        return result

    def _run_chunk(
        self,
        student_chunk: Tensor,
        teacher_chunks: Mapping[str | None, LogitChunk],
        start: int,
        gradient: Tensor | None,
        scaling: LogitScaling,
    ) -> None:
        """Store the terms and statistics of a chunk, and write the gradient of their weighted sum.

        Args:
            student_chunk: [t, V_s]; overwritten if there is a gradient.
            teacher_chunks: name -> [t, V_t], or sparse log-probabilities of t tokens.
            start: index of the chunk's first target token.
            gradient: [t, V_s], with respect to the output of the student's output head, is written; it may be
                `student_chunk` itself. None computes no gradients.
            scaling: of the student logits.
        """
        size = block_rows(student_chunk.shape[1] * student_chunk.element_size(), student_chunk.device.type)
        for block in cut_rows(len(student_chunk), self._whole_groups(size), aligned_only(teacher_chunks)):
            teacher_blocks = {name: slice_chunk(chunk, block) for name, chunk in teacher_chunks.items()}
            gradients = self._run_block(student_chunk[block], teacher_blocks, start + block.start, gradient is not None)
            if gradient is not None:
                _write_gradient(student_chunk[block], gradients, scaling, gradient[block])

    @property
    def rows_together(self) -> int:
        """Number of consecutive targets that the losses read together."""
        return math.lcm(*(term.loss.rows_together for term in self.terms))

    def _whole_groups(self, size: int) -> int:
        """Return a number of targets near `size` that divides no group of targets that a loss reads together."""
        return max(size - size % self.rows_together, self.rows_together)

    def _row_losses(self, student_logits: DenseLogits | LazyLogits) -> RowLosses | None:
        """Return the terms and statistics for the Triton kernel; None if it does not compute them."""
        if not uses_row_kernel(self.terms, student_logits, self.teacher_logits):
            return None
        if self.statistics_every and not self.output_type.kernel_computes_metrics:
            return None
        return RowLosses(
            self.terms,
            has_teacher=self.teacher_logits is not None,
            statistics_every=self.statistics_every,
            factor=self._gradient_factor,
            may_be_masked=self._may_be_masked,
        )

    def _metric_names(self) -> list[str]:
        """Return the keys of `per_token`, which must not depend on the batch: all ranks have to agree on them."""
        names = [term.name for term in self.terms]
        if self.statistics_every:
            names += dict.fromkeys(("measured", *self.output_type.student_metrics))
            first_teacher = next(iter(logits_by_teacher(self.teacher_logits).values()), None)
            names += self.output_type.pair_metrics if isinstance(first_teacher, DenseLogits | LazyLogits) else ()
            if isinstance(first_teacher, CrossTokenizerLogits):
                names += () if is_sparse(first_teacher) else CHUNK_METRICS
                names += CHUNK_TOTALS if self.statistics_every == 1 and first_teacher.chunk_bytes is not None else ()
        return names

    def _store(self, name: str, rows: slice, values: Tensor) -> None:
        """Copy the values of a block into the one tensor for all tokens.

        Small tensors that outlive a block's large temporaries would fragment the heap.
        """
        self.per_token[name][rows] = values.detach()

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
        rows = slice(start, start + len(student_block))
        targets = self.targets.slice(rows)
        self._buffer_pool.release_all()
        student_only = BlockLogits(student_block, None, targets.labels, self._buffer_pool, self._may_be_masked)
        blocks = {name: student_only.with_teacher(teacher_block) for name, teacher_block in teacher_blocks.items()}
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
                    gradients.append((gradient, factor * self._gradient_factor))
            else:
                values = term(student_signals, teacher_signals.get(term.teacher), targets)
            self._store(term.name, rows, values if label_mask is None else values * label_mask)
        if self.statistics_every:
            self._store_statistics(student_only, next(iter(blocks.values()), None), rows)
        return gradients

    def _store_statistics(self, student_only: BlockLogits, block: BlockLogits | None, rows: slice) -> None:
        """Store the statistics of every n-th target token of a block; the softmaxes of its terms are reused.

        Args:
            student_only: the student logits of the block.
            block: the logits of student and first teacher, or None.
            rows: target tokens of the block.
        """
        if block is not None and block.aligned_teacher is not None:
            if "chunk_kl" in self.per_token:
                first_tokens, metrics = chunk_metrics(block, self.statistics_every)
                for name, values in metrics.items():
                    self.per_token[name].index_copy_(0, first_tokens + rows.start, values)
            block = None
        sampled = slice(-rows.start % self.statistics_every, None, self.statistics_every)
        if sampled.start >= len(student_only.labels):
            return
        student_only = student_only.slice(sampled)
        targets = self.targets.slice(slice(rows.start + sampled.start, rows.stop, self.statistics_every))
        block = None if block is None or block.sparse_teacher else block.slice(sampled, student_only)
        stored = slice(rows.start + sampled.start, rows.stop, self.statistics_every)
        metrics = self.output_type.metrics(student_only, block, targets)
        metrics.setdefault("measured", student_only.student.new_ones(len(student_only.student)))
        for name, values in metrics.items():
            self._store(name, stored, values)


def _write_gradient(
    student_block: Tensor, gradients: list[tuple[Tensor, float]], scaling: LogitScaling, out: Tensor
) -> None:
    """Write the gradient with respect to the output of the student's output head.

    Args:
        student_block: [r, V]; overwritten.
        gradients: (gradient [r, v] with respect to the first v logits, factor); they are summed.
        scaling: applied to the head's output by the model; its derivative is multiplied in.
        out: [r, V], may be `student_block`, unless its dtype differs.
    """
    if not gradients:
        out.zero_()
        return
    derivative = scaling.derivative(student_block)
    is_scaled = isinstance(derivative, Tensor) or derivative != 1.0
    gradients = sorted(gradients, key=lambda item: item[0].shape[1], reverse=True)
    # The last sum is rounded to the dtype of `out` as it is written, unless more is done with it.
    is_last_sum_final = not is_scaled and gradients[-1][0].shape[1] == out.shape[1]
    for i, (gradient, factor) in enumerate(gradients):
        width = gradient.shape[1]
        total = out if is_last_sum_final and i == len(gradients) - 1 else student_block
        if i == 0:
            torch.mul(gradient, factor, out=total[:, :width])
            total[:, width:] = 0
        else:
            torch.add(student_block[:, :width], gradient, alpha=factor, out=total[:, :width])
    if is_scaled:
        student_block.mul_(derivative)
    if not is_last_sum_final and out.dtype != student_block.dtype:
        out.copy_(student_block)


class _LossFromHidden(torch.autograd.Function):
    """hidden [T, H], weight [V, H], bias [V] or None -> sum of the terms, []; gradients are computed in the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        student_logits: LazyLogits,
        needs_gradient: bool,
        chunked_loss: ChunkedLoss,
    ) -> Tensor:
        tensors = (hidden, weight, bias)
        dtype = compute_dtype(hidden, weight)
        new = hidden.new_empty if len(hidden) else hidden.new_zeros
        ctx.gradients = [
            new(t.shape, dtype=dtype) if needs_gradient and t is not None and t.requires_grad else None for t in tensors
        ]
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        token_weights = chunked_loss.token_weights()
        # Hidden states are multiplied by the weights of their tokens, and not gradients [t, V], which are much larger.
        weighted = student_logits.hidden
        if token_weights is not None:
            weighted = weighted * token_weights[:, None].to(weighted.dtype)

        def on_gradient(rows: slice, gradient: Tensor) -> None:
            is_later_chunk = rows.start > 0
            if grad_hidden is not None:
                accumulate_matmul(gradient, student_logits.weight, grad_hidden[rows], keep=False)
                if token_weights is not None:
                    grad_hidden[rows].mul_(token_weights[rows, None])
            if grad_weight is not None:
                accumulate_matmul(gradient.t(), weighted[rows], grad_weight, keep=is_later_chunk)
            if grad_bias is not None:
                of_tokens = gradient if token_weights is None else gradient.to(dtype) * token_weights[rows, None]
                sums = of_tokens.sum(0, dtype=dtype)
                grad_bias.copy_(grad_bias + sums if is_later_chunk else sums)

        needs = any(gradient is not None for gradient in ctx.gradients)
        rounds = rounds_gradient_to_bf16(student_logits.hidden, student_logits.weight)
        ctx.unit = chunked_loss.gradient_unit() if rounds else 1.0
        with torch.autocast(hidden.device.type, enabled=False):
            return chunked_loss.run_chunks(
                student_logits, on_gradient if needs else None, torch.bfloat16 if rounds else dtype, ctx.unit
            )

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError(
                "The gradients of the fused loss were already used by an earlier backward: run the forward again."
            )
        gradients, ctx.gradients = ctx.gradients, None
        factor = grad_total if ctx.unit == 1.0 else grad_total * ctx.unit
        return (*(_scaled(g, factor, d) for g, d in zip(gradients, ctx.dtypes, strict=True)), None, None, None)


def _scaled(gradient: Tensor | None, factor: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """Return a gradient times a factor [] in a dtype, in one pass; the gradient may be overwritten."""
    if gradient is None:
        return None
    if factor.device.type == "cpu" and factor == 1:
        return gradient.to(dtype)
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))


class _LossFromLogits(torch.autograd.Function):
    """student logits [T, V] -> sum of the terms, []; the gradient is computed in the forward."""

    @staticmethod
    def forward(ctx: Any, student_values: Tensor, needs_gradient: bool, chunked_loss: ChunkedLoss) -> Tensor:
        grad_logits: Any = torch.empty_like(student_values) if needs_gradient else None
        token_weights = chunked_loss.token_weights()

        def on_gradient(rows: slice, gradient: Tensor) -> None:
            grad_logits[rows] = gradient if token_weights is None else gradient * token_weights[rows, None]

        ctx.grad_logits = grad_logits
        with torch.autocast(student_values.device.type, enabled=False):
            return chunked_loss.run_chunks(DenseLogits(student_values), on_gradient if needs_gradient else None)

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.grad_logits * grad_total, None, None
