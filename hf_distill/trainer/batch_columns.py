"""Columns that a trainer adds to a batch: the author of each token, and the teacher of each token."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.row_values import ORIGIN, ORIGINS
from ..core.targets import TEACHER_INDEX
from ..teachers import RoutedTeacher, Teacher

SOURCE = "source"  # key of a batch: index of the source of a mixture that each token is from


def with_origin(inputs: dict[str, Tensor], source_names: Sequence[str], is_training: bool) -> dict[str, Tensor]:
    """Return a batch with the origin of each token, if the batch does not have it and its sources tell it.

    Args:
        inputs: the collator's batch.
        source_names: names of the sources of a mixture; if all of them are origins, they are those of the tokens.
        is_training: whether the batch is trained on. The rows of an evaluation without origins are the data's.
    """
    if ORIGIN in inputs:
        return inputs
    if (source := inputs.get(SOURCE)) is not None and {*source_names} <= {*ORIGINS}:
        origins = torch.zeros_like(source)
        for index, name in enumerate(source_names):
            origins = origins.masked_fill(source == index, ORIGINS.index(name))
        return {**inputs, ORIGIN: origins}
    if not is_training and (labels := inputs.get("labels")) is not None:
        return {**inputs, ORIGIN: torch.full_like(labels[:, 0], ORIGINS.index("data"))}
    return inputs


def with_teacher_index(
    inputs: dict[str, Tensor], teacher: Teacher | None, source_names: Sequence[str]
) -> dict[str, Tensor]:
    """Return a batch without `source`, and with the index of each token's teacher if the teachers have sources.

    Args:
        inputs: the collator's batch.
        teacher: the teacher; None if there is none.
        source_names: names of the sources of a mixture.
    """
    source = inputs.get(SOURCE)
    inputs = {name: value for name, value in inputs.items() if name != SOURCE}
    if isinstance(teacher, RoutedTeacher) and teacher.sources is not None:
        inputs[TEACHER_INDEX] = teacher.teacher_index(source, source_names)
    return inputs
