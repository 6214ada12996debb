"""`LogitBuffers`: the logits of student and teachers for a chunk of target tokens, in memory that all chunks share."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..core.aligned_logits import AlignedLogits, CrossTokenizerLogits
from ..core.logits import DenseLogits, LazyLogits, LogitScaling, SparseLogProbs
from ..core.teacher_logits import OneTeacherLogits
from .fused_buffers import auto_chunk_tokens, gradient_has_buffer, new_row_buffer
from .kernels.row_losses import HeadOutput

LogitSource: TypeAlias = DenseLogits | LazyLogits | SparseLogProbs | AlignedLogits
LogitChunk: TypeAlias = Tensor | SparseLogProbs | AlignedLogits


@dataclass
class LogitBuffers:
    """Memory for the logits of one chunk and for their gradient, which all chunks use in turn.

    student:  [t, V_s]
    teachers: name -> [t, V_t]; None for a sparse teacher
    gradient: [t, V_s]; the buffer of the student, unless the gradient needs one of its own
    """

    student: Any
    teachers: Mapping[str | None, Any]
    gradient: Any

    @classmethod
    def allocate(
        cls,
        student_logits: DenseLogits | LazyLogits,
        teacher_logits: Mapping[str | None, LogitSource],
        rows: int,
        dtype: torch.dtype,
    ) -> "LogitBuffers":
        """Allocate the buffers of the logits for a number of rows."""
        student = _new_buffer(student_logits, rows, dtype)
        return cls(student, {name: _new_buffer(each, rows, dtype) for name, each in teacher_logits.items()}, student)

    def allocate_gradient(
        self, student_logits: DenseLogits | LazyLogits, rows: int, dtype: torch.dtype, in_kernel: bool
    ) -> None:
        """Allocate a buffer for the gradient, if it cannot overwrite the student's logits."""
        if gradient_has_buffer(in_kernel, dtype.itemsize, self.student.dtype.itemsize):
            self.gradient = _new_buffer(student_logits, rows, dtype)

    def logits(
        self, student_logits: DenseLogits | LazyLogits, teacher_logits: Mapping[str | None, LogitSource], rows: slice
    ) -> tuple[Tensor, dict[str | None, LogitChunk]]:
        """Compute the logits of a chunk: of the student [t, V_s], and of each teacher."""
        student_chunk = student_logits.project(rows, out=self.student)
        return student_chunk, {
            name: _teacher_chunk(teacher, rows, self.teachers[name], student_chunk.device)
            for name, teacher in teacher_logits.items()
        }

    def head_outputs(
        self,
        student_logits: DenseLogits | LazyLogits,
        teacher_logits: Mapping[str | None, LogitSource],
        rows: slice,
        device: torch.device,
    ) -> list[HeadOutput]:
        """Compute what the Triton kernel reads of a chunk: the outputs of the heads, that of the student first."""
        outputs = [_head_output(student_logits, rows, self.student, device)]
        return outputs + [_head_output(t, rows, self.teachers[name], device) for name, t in teacher_logits.items()]


def tokens_per_chunk(
    student_logits: LogitSource, teacher_logits: Mapping[str | None, OneTeacherLogits], dtype: torch.dtype
) -> int:
    """Return `auto_chunk_tokens` for the models whose logits are computed."""
    sources: list[Any] = [source for source in (student_logits, *teacher_logits.values()) if not is_sparse(source)]
    device = reference_tensor(student_logits).device
    return auto_chunk_tokens([source.vocab_size for source in sources], dtype.itemsize, device.type)


def is_sparse(source: Any) -> bool:
    """Whether a teacher returns no logits, but log-probabilities of some ids, or nothing that a loss reads."""
    if isinstance(source, CrossTokenizerLogits):
        return is_sparse(source.logits)
    if isinstance(source, AlignedLogits):
        return source.first_logits is None or is_sparse(source.first_logits)
    return isinstance(source, SparseLogProbs)


def _new_buffer(source: LogitSource, rows: int, dtype: torch.dtype) -> Any:
    """Allocate a buffer [rows, V] for logits or their gradient; None for a sparse teacher."""
    if is_sparse(source):
        return None
    logits: Any = source.first_logits if isinstance(source, AlignedLogits) else source
    return new_row_buffer(reference_tensor(logits), rows, logits.vocab_size, dtype)


def reference_tensor(source: Any) -> Tensor:
    """Return a tensor of the device and dtype of the logits."""
    return source.hidden if isinstance(source, LazyLogits) else source.values


def may_be_masked(source: Any) -> bool:
    """Whether some logits may be -inf; those of an output head without a bias never are.

    The values on a GPU are not read, because that would wait for it; there they may be.
    """
    if is_sparse(source):
        return False
    if isinstance(source, AlignedLogits):
        return may_be_masked(source.first_logits)
    values = source.values if isinstance(source, DenseLogits) else source.bias
    return values is not None and (values.device.type != "cpu" or bool((values == -torch.inf).any()))


def _teacher_chunk(teacher: LogitSource, rows: slice, buffer: Tensor | None, device: torch.device) -> LogitChunk:
    """Return the teacher logits of a chunk, [t, V_t], on the student's device; a sparse teacher stays sparse."""
    if isinstance(teacher, SparseLogProbs):
        return teacher.slice(rows)
    if not isinstance(teacher, AlignedLogits):
        return teacher.project(rows, out=buffer).to(device)
    aligned = teacher.slice(rows)
    if isinstance(aligned.first_logits, DenseLogits | LazyLogits):
        values = aligned.first_logits.project(out=buffer).to(device)
        aligned = replace(aligned, first_logits=DenseLogits(values))
    return aligned


def _head_output(source: Any, rows: slice, buffer: Tensor | None, device: torch.device) -> HeadOutput:
    """Return what the output head of a dense or lazy source gives for a chunk, [t, V], on the student's device."""
    bias = source.bias if isinstance(source, LazyLogits) else None
    values = source.head_output(rows, buffer).to(device)
    return HeadOutput(values, None if bias is None else bias.to(device), scaling_of(source))


def scaling_of(source: Any) -> LogitScaling:
    """Return the scale and soft cap of logits that are not materialized yet; materialized logits have them."""
    return source.scaling if isinstance(source, LazyLogits) else LogitScaling()


def slice_chunk(chunk: LogitChunk, block_rows: slice) -> LogitChunk:
    """Return some rows of the teacher logits of a chunk."""
    return chunk[block_rows] if isinstance(chunk, Tensor) else chunk.slice(block_rows)
