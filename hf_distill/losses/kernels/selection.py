"""Whether the Triton kernel computes the losses of a batch. Analytic gradients or autograd compute all others."""

import importlib.util
import os
from collections.abc import Sequence
from functools import cache

import torch

from ...core.aligned_logits import AlignedLogits, CrossTokenizerLogits
from ...core.logits import DenseLogits, LazyLogits, SparseLogProbs, compute_dtype
from ...core.teacher_logits import MultiTeacherLogits, OneTeacherLogits
from ..cross_entropy import cross_entropy
from ..objective import Term
from .row_losses import SHARE_OPTIONS


def uses_row_kernel(
    terms: Sequence[Term],
    student: DenseLogits | LazyLogits,
    teacher: OneTeacherLogits | MultiTeacherLogits | None,
) -> bool:
    """Return whether the Triton kernel computes all terms of an objective; on a GPU, log once why it does not.

    Args:
        terms: of the objective.
        student: the student's logits.
        teacher: logits of the teacher or teachers; None without a teacher.
    """
    reason = reason_for_eager(terms, student, teacher)
    if reason and _is_on_gpu(student):
        from transformers.utils import logging  # here, so that `hf_distill.head` needs torch alone

        logging.get_logger(__name__).warning_once(
            f"The Triton kernel is not used, because {reason}. The fused loss then reads and writes the logits of each "
            "chunk once for each operation on them, which takes longer; `python benchmarks/gpu.py --stages losses` "
            "measures it."
        )
    return not reason


def reason_for_eager(
    terms: Sequence[Term],
    student: DenseLogits | LazyLogits,
    teacher: OneTeacherLogits | MultiTeacherLogits | None,
) -> str:
    """Return why the Triton kernel does not compute the terms of an objective; "" if it does.

    Args:
        terms: of the objective.
        student: the student's logits.
        teacher: logits of the teacher or teachers; None without a teacher.
    """
    tensor = _tensor(student)
    if not _is_on_gpu(student) and not (tensor.device.type == "cpu" and _is_interpreted()):
        return f"the logits are on {tensor.device.type}"
    if torch.version.hip:
        return "it was not tested on ROCm"
    if problem := triton_problem(tensor.device):
        return problem
    if isinstance(teacher, MultiTeacherLogits):
        return "there are several teachers"
    if isinstance(teacher, CrossTokenizerLogits | AlignedLogits):
        return "the teacher has another tokenizer"
    if isinstance(teacher, SparseLogProbs):
        return "the teacher's log-probabilities are sparse"
    if compute_dtype(tensor, *([] if teacher is None else [_tensor(teacher)])) == torch.float64:
        return "the logits are float64"
    unsupported = [term.loss.name for term in terms if term.loss.function not in (cross_entropy, *SHARE_OPTIONS)]
    if unsupported:
        return f"it does not compute the loss {', '.join(sorted(set(unsupported)))}"
    return ""


@cache
def triton_problem(device: torch.device) -> str:
    """Return why Triton runs no kernel on a device; "" if it does. PyTorch's wheels for CUDA bring Triton.

    A kernel is run as a trial, because Triton needs a C compiler for the first one and refuses old GPUs.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        from .row_kernel import write_one

        trial = torch.zeros(1, device=device)
        with torch.cuda.device_of(trial):
            write_one[(1,)](trial)
    except Exception as error:  # of Triton, of its compiler, or of the C compiler
        return f"a first kernel of Triton failed with {type(error).__name__}: {error}"
    return ""


def _is_interpreted() -> bool:
    """Return whether Triton runs kernels in Python, on a CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _is_on_gpu(source: DenseLogits | LazyLogits) -> bool:
    return _tensor(source).is_cuda


def _tensor(source: DenseLogits | LazyLogits) -> torch.Tensor:
    """Return a tensor of the device and dtype of the logits."""
    return source.hidden if isinstance(source, LazyLogits) else source.values
