"""Losses on the hidden states of a pair of layers: one number for each token, [N], computed in float32 or float64."""

import torch
from torch import Tensor

from ..core.logits import compute_dtype
from ..core.targets import Targets
from ..errors import DistillError
from .registry import loss


@loss("hidden_mse", compares=("hidden",), paper="1412.6550", project=True)
def hidden_mse(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Mean squared error of the hidden states.

    mean_i (s_i - t_i)^2 over the width H

    Args:
        student: [N, H], projected to the teacher's width.
        teacher: [N, H].
        targets: not used.

    Returns:
        [N], as `torch.nn.functional.mse_loss(..., reduction="none").mean(-1)`; 0 for equal states.

    Raises:
        DistillError: the shapes differ.

    Source: FitNets, arXiv 1412.6550.
    """
    student, teacher = _check_same_shape(student, teacher)
    return (student - teacher).square().mean(-1)


@loss("hidden_cosine", compares=("hidden",), paper="1910.01108", project=True)
def hidden_cosine(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Cosine distance of the hidden states.

    1 - cos(s, t)

    Args:
        student: [N, H], projected to the teacher's width.
        teacher: [N, H].
        targets: not used.

    Returns:
        [N], in [0, 2]; 0 for states of the same direction.

    Raises:
        DistillError: the shapes differ.

    Source: DistilBERT, arXiv 1910.01108.
    """
    s, t = _normalize(*_check_same_shape(student, teacher))
    # Half the squared distance of the unit vectors is exactly 0 for equal ones; 1 - cos would have a rounding error.
    return (s - t).square().sum(-1) / 2


@loss("hidden_normalized_mse", compares=("hidden",), project=True)
def hidden_normalized_mse(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Mean squared error of the normalized hidden states.

    mean_i (s_i / |s| - t_i / |t|)^2 = 2 * (1 - cos(s, t)) / H

    Args:
        student: [N, H], projected to the teacher's width.
        teacher: [N, H].
        targets: not used.

    Returns:
        [N]. It is `hidden_cosine` times 2 / H, so its weight has to grow with the width.

    Raises:
        DistillError: the shapes differ.
    """
    return hidden_cosine(student, teacher, targets) * (2 / teacher.shape[-1])


@loss("hidden_relation", compares=("hidden",), paper="1907.09682")
def hidden_relation(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Squared difference of the cosine similarities between tokens.

    mean_u (cos(s_n, s_u) - cos(t_n, t_u))^2 for token n and the tokens u of its document

    The widths may differ, and no projector is needed.

    Args:
        student: [N, H_s].
        teacher: [N, H_t].
        targets: the N tokens.

    Returns:
        [N]; 0 if the cosine similarities of both models are equal.

    Source: similarity-preserving distillation, arXiv 1907.09682, with tokens instead of examples.
    """
    s, t = _normalize(*_upcast(student, teacher))
    documents, values = targets.document_ids(), [s.new_zeros(0)]
    for _, row in targets.by_row():
        same_document = (documents[row, None] == documents[row]).to(s.dtype)
        difference = (s[row] @ s[row].T - t[row] @ t[row].T).square() * same_document
        values.append(difference.sum(-1) / same_document.sum(-1))
    return torch.cat(values)


def _upcast(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(student)
    return student.to(dtype), teacher.to(dtype)


def _check_same_shape(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise DistillError(
            f"The student's hidden states have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}, "
            "and this loss compares them element by element: use a projector to the teacher's width, or "
            "hidden_relation."
        )
    return _upcast(student, teacher)


def _normalize(*states: Tensor) -> list[Tensor]:
    return [torch.nn.functional.normalize(state, dim=-1) for state in states]
