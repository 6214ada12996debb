"""The losses and statistics that one launch of the Triton kernel computes for a chunk of logits."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...core.logits import LogitScaling
from .. import divergences
from ..cross_entropy import cross_entropy
from ..objective import Term
from ..token_metrics import PAIR_METRICS, STUDENT_METRICS

# The divergences of the kernel, with the option that is its `share`.
SHARE_OPTIONS: dict[Callable, str | None] = {
    divergences.forward_kl: None,
    divergences.reverse_kl: None,
    divergences.js: "beta",
    divergences.skew_kl: "lam",
    divergences.skew_reverse_kl: "lam",
}
WITHOUT_MIXTURE = ("forward_kl", "reverse_kl")


@dataclass(frozen=True)
class HeadOutput:
    """The output of a model's head for a chunk of target tokens: its logits are `scaling(values + bias)`.

    values:  [r, V] in float32, bfloat16 or float16; rows may be padded
    bias:    [V] of the output head, or None
    scaling: scale and soft cap
    """

    values: Tensor
    bias: Tensor | None = None
    scaling: LogitScaling = field(default_factory=LogitScaling)

    def kernel_argument(self) -> tuple[Tensor, int, int, Tensor | None, float, float | None]:
        """Return (values, row stride, readable ids of a row, bias, scale, softcap), the kernel's `student`."""
        values = self.values if self.values.stride(1) == 1 else self.values.contiguous()
        bias = None if self.bias is None else self.bias.contiguous()
        softcap = None if self.scaling.softcap is None else float(self.scaling.softcap)
        return values, values.stride(0), padded_row_size(values), bias, float(self.scaling.scale), softcap


def padded_row_size(values: Tensor) -> int:
    """Return V rounded up to a multiple of 16 if the rows [r, V] are padded to it, else V.

    Triton reads and writes several numbers at a time only where their count is known to be a multiple of 16. The
    padding is read but not used.
    """
    num_rows, size = values.shape
    padded_size = -(-size // 16) * 16
    end = values.storage_offset() + (num_rows - 1) * values.stride(0) + padded_size
    has_padding = values.stride(0) % 16 == 0 and end * values.element_size() <= values.untyped_storage().nbytes()
    return padded_size if num_rows and has_padding else size


class RowLosses:
    """All terms of an objective, and the statistics, of a chunk of target tokens in one launch of the Triton kernel.

    Args:
        terms: divergences that are keys of `SHARE_OPTIONS`, and cross entropies.
        has_teacher: whether teacher logits are compared in terms or statistics.
        statistics_every: target tokens whose index is a multiple of it are measured; 0 for no statistics.
        factor: of the gradient, 1 / number of items.
        may_be_masked: whether some logits may be -inf.
    """

    def __init__(
        self,
        terms: Sequence[Term],
        has_teacher: bool,
        statistics_every: int = 0,
        factor: float = 1.0,
        may_be_masked: bool = False,
    ):
        soft = [term for term in terms if term.loss.function in SHARE_OPTIONS]
        hard = [term for term in terms if term.loss.function is cross_entropy]
        smoothings = tuple(float(term.options.get("label_smoothing", 0.0)) for term in hard)
        metrics = (*STUDENT_METRICS, *(PAIR_METRICS if has_teacher else ())) if statistics_every else ()
        self.names = [*(term.name for term in (*soft, *hard)), *metrics]
        self._has_teacher = has_teacher
        self._statistics_every = statistics_every
        self._numbers: dict[str, Any] = {
            "divergences": tuple(_divergence_argument(term, factor) for term in soft),
            "smoothings": smoothings,
            "ce_factors": (
                factor * sum(float(term.weight) for term in hard),
                factor * sum(term.weight * smoothing for term, smoothing in zip(hard, smoothings, strict=True)),
            ),
        }
        self._kinds = [term.loss.function.__name__ for term in soft]
        self._constants: dict[str, Any] = {
            "HAS_GRADIENT": tuple(term.weight != 0 for term in soft),
            "HAS_CE_GRADIENT": any(term.weight != 0 for term in hard),
            "HAS_SMOOTHING": any(smoothings),
            "HAS_MIXTURE": not set(self._kinds) <= set(WITHOUT_MIXTURE),
            "HAS_STATISTICS": statistics_every > 0,
            "HAS_TEACHER": has_teacher,
            "MAY_BE_MASKED": may_be_masked,
        }

    def run(
        self,
        outputs: Sequence[HeadOutput],
        labels: Tensor,
        label_mask: Tensor | None,
        out: Tensor,
        gradient: Tensor | None,
        first_token: int = 0,
    ) -> None:
        """Compute a chunk of r target tokens.

        Args:
            outputs: of the heads of the student, [r, V_s], and of the teacher, if there is one, [r, V_t].
            labels: [r] ids.
            label_mask: [r] whether cross entropy counts; None if it counts for all tokens.
            out: [len(names), r] float32, written: terms (scaled, not weighted) and statistics; statistics of tokens
                that are not measured are left as they are.
            gradient: [r, V_s], written: the gradient of the weighted sum of the terms with respect to the output of
                the student's head, times `factor`. It must not share memory with the logits. None computes none.
            first_token: index of the first row among the target tokens.
        """
        if len(labels):
            from .row_kernel import losses_and_gradient

            arguments = self.arguments(outputs, labels, label_mask, out, gradient, first_token)
            with torch.cuda.device_of(labels):  # Triton starts a kernel on the current device
                losses_and_gradient[(len(labels),)](**arguments)

    def arguments(
        self,
        outputs: Sequence[HeadOutput],
        labels: Tensor,
        label_mask: Tensor | None,
        out: Tensor,
        gradient: Tensor | None,
        first_token: int = 0,
    ) -> dict[str, Any]:
        """Return the arguments of the kernel for a chunk, see `run`."""
        from . import row_kernel

        student, teacher = outputs[0], outputs[-1]
        student_size, teacher_size = student.values.shape[1], teacher.values.shape[1]
        shared_size = min(student_size, teacher_size) if self._has_teacher else 0
        gradient_limit = shared_size
        if gradient is not None and shared_size == student_size:
            gradient_limit = padded_row_size(gradient)
        block, num_warps = block_and_warps(student_size)
        return {
            "student": student.kernel_argument(),
            "teacher": teacher.kernel_argument(),
            "labels_ptr": labels.contiguous(),
            "has_label_ptr": None if label_mask is None else label_mask.contiguous(),
            "out_ptr": out,
            "out_stride": out.stride(0),
            "gradient_ptr": gradient,
            "gradient_stride": gradient.stride(0) if gradient is not None else 0,
            "gradient_limit": gradient_limit,
            "V_s": student_size,
            "V_t": teacher_size,
            "V_shared": shared_size,
            "first_token": first_token,
            "statistics_every": max(self._statistics_every, 1),
            **self._numbers,
            "KINDS": tuple(getattr(row_kernel, kind.upper()).value for kind in self._kinds),
            **self._constants,
            "BLOCK": block,
            "num_warps": num_warps,
        }

    def bytes_moved(self, outputs: Sequence[HeadOutput], gradient: Tensor | None) -> int:
        """Return the bytes that a launch reads and writes: each pass reads the logits again.

        One number for each row (labels, losses, statistics) is left out.
        """
        num_passes = 1 + self._constants["HAS_MIXTURE"] + (gradient is not None)
        return num_passes * sum(map(_num_bytes, (o.values for o in outputs))) + (
            0 if gradient is None else _num_bytes(gradient)
        )


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def block_and_warps(vocab_size: int) -> tuple[int, int]:
    """Return the ids in a block and the warps of a program.

    They depend on V alone, so that every run adds the ids in the same order, and nothing is tuned at run time. Each of
    128 threads has 8 ids of a block of 1024. Compiled for compute capability 9.0, a program then needs at most 128
    registers a thread with a divergence, cross entropy and statistics, so that four programs fit a multiprocessor and
    64 KiB of logits are on their way to it. Blocks of 2048 ids need twice the threads or twice the registers and leave
    room for two programs; with 4 ids for each thread, finding the maximum of a block takes a larger share of the time.
    """
    block = 128
    while block < min(vocab_size, 1024):
        block *= 2
    return block, max(1, block // 256)


def _divergence_argument(term: Term, factor: float) -> tuple[float, float, float, float]:
    """Return (1 / T, beta or lam, factor of the value, factor of the gradient) of a divergence."""
    temperature = float(term.options.get("temperature", 1.0))
    option = SHARE_OPTIONS[term.loss.function]
    share = 0.0 if option is None else float(term.options.get(option, term.loss.options[option]))
    return (
        1 / temperature,
        share,
        float(term.temperature_squared),
        factor * term.weight * term.temperature_squared / temperature,
    )
