"""Losses on the embeddings of a row: the last hidden states of student and teacher, pooled to one vector."""

import torch
from torch import Tensor

from ..core.loss_kinds import EMBEDDING
from ..core.targets import Targets
from ..errors import DistillError
from .registry import loss

EMBEDDING_SIMILARITY = "embedding_similarity"  # the cosine similarity of each target; logged as `embedding_cosine`


@loss("embedding_mse", compares=(EMBEDDING,), paper="2004.09813", project=True)
def embedding_mse(student: Tensor, teacher: Tensor, targets: Targets, *, normalize: bool = False) -> Tensor:
    """Mean squared error of the embeddings.

    mean_i (s_i - t_i)^2 over the width H; with `normalize` of s / |s| and t / |t|, which is 2 (1 - cos(s, t)) / H

    Args:
        student: [B, H], projected to the teacher's width.
        teacher: [B, H].
        targets: not used.
        normalize: whether both embeddings are divided by their norm.

    Returns:
        [B]; 0 for equal embeddings.

    Raises:
        DistillError: the widths differ.

    Source: multilingual sentence embeddings by distillation, arXiv 2004.09813.
    """
    _check_same_width(student, teacher)
    s, t = (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher)) if normalize else (student, teacher)
    return (s - t).square().mean(-1)


@loss("embedding_cosine", compares=(EMBEDDING,), project=True)
def embedding_cosine(student: Tensor, teacher: Tensor, targets: Targets) -> Tensor:
    """Cosine distance of the embeddings.

    1 - cos(s, t)

    Args:
        student: [B, H], projected to the teacher's width.
        teacher: [B, H].
        targets: not used.

    Returns:
        [B], in [0, 2]; 0 for embeddings of the same direction.

    Raises:
        DistillError: the widths differ.
    """
    _check_same_width(student, teacher)
    s, t = (torch.nn.functional.normalize(x, dim=-1) for x in (student, teacher))
    # Half the squared distance of the unit vectors is exactly 0 for equal ones; 1 - cos would have a rounding error.
    return (s - t).square().sum(-1) / 2


def _check_same_width(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise DistillError(
            f"The student's embeddings have shape {tuple(student.shape)} and the teacher's {tuple(teacher.shape)}, and "
            "they are compared element by element: use a projector to the teacher's width (projectors='linear')."
        )
