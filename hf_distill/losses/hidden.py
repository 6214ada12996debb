"""Losses on hidden states of one pair of layers. In float32 at least; [N] numbers, one a token."""

import torch
from torch import Tensor

from ..core.logits import compute_dtype
from ..core.targets import Targets
from ..errors import DistillError
from .registry import loss


@loss("hidden_mse", needs=("hidden",), paper="1412.6550", project=True)
def hidden_mse(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Mean over the width of the squared difference.

    Args:
        student: [N, H], projected to the teacher's width.
        teacher: [N, H].
        targets: not used.

    Returns:
        [N]. 0 for equal states. As `torch.nn.functional.mse_loss(..., reduction="none").mean(-1)`.

    Raises:
        DistillError: the shapes differ.

    Source: FitNets, arXiv 1412.6550.
    """
    student, teacher = _alike(student, teacher)
    return (student - teacher).square().mean(-1)


@loss("hidden_cosine", needs=("hidden",), paper="1910.01108", project=True)
def hidden_cosine(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """1 - cos(student, teacher).

    Args:
        student: [N, H], projected to the teacher's width.
        teacher: [N, H].
        targets: not used.

    Returns:
        [N], in [0, 2]. 0 for states of one direction, whatever their lengths.

    Raises:
        DistillError: the shapes differ.

    Source: DistilBERT, arXiv 1910.01108.
    """
    s, t = _unit(*_alike(student, teacher))
    # Half the squared distance of unit vectors: exactly 0 for equal ones, where 1 - cos is a rounding error.
    return (s - t).square().sum(-1) / 2


@loss("hidden_normalized_mse", needs=("hidden",), project=True)
def hidden_normalized_mse(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Mean over the width of the squared difference of unit vectors: 2 (1 - cos) / H.

    Args:
        student: [N, H], projected to the teacher's width.
        teacher: [N, H].
        targets: not used.

    Returns:
        [N]. `hidden_cosine` times 2 / H, so its weight has to grow with the width.

    Raises:
        DistillError: the shapes differ.
    """
    return hidden_cosine(student, teacher, targets) * (2 / teacher.shape[-1])


@loss("hidden_relation", needs=("hidden",), paper="1907.09682")
def hidden_relation(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Mean over the tokens u of its document of (cos(s_n, s_u) - cos(t_n, t_u))^2, for each token n.

    Widths may differ: no projector is needed.

    Args:
        student: [N, H_s].
        teacher: [N, H_t].
        targets: the N tokens; only they are related to each other.

    Returns:
        [N]. 0 where states have equal angles among themselves.

    Source: similarity-preserving distillation, arXiv 1907.09682, with tokens for its examples.
    """
    s, t = _unit(*_exact(student, teacher))
    own, values = targets.own_documents(), [s.new_zeros(0)]
    for _, row in targets.by_row():
        together = (own[row, None] == own[row]).to(s.dtype)
        difference = (s[row] @ s[row].T - t[row] @ t[row].T).square() * together
        values.append(difference.sum(-1) / together.sum(-1))
    return torch.cat(values)


def _exact(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student)
    return student.to(dtype), teacher.to(dtype)


def _alike(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise DistillError(
            f"Hidden states of shape {tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared number by "
            "number: project the student's to the teacher's width first, or use hidden_relation."
        )
    return _exact(student, teacher)


def _unit(*states: Tensor) -> list[Tensor]:
    return [torch.nn.functional.normalize(state, dim=-1) for state in states]
