"""`StepInputs`: what student and teacher read of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..core.pooling import PooledRows
from ..core.row_values import ORIGIN, ORIGINS, WEIGHT
from ..core.signals import FeatureKey
from ..core.targets import IGNORE_INDEX, FeatureTokens, RowPositions, Targets, target_labels
from ..core.teacher_inputs import (
    teacher_batch,
    teacher_inputs,
    teacher_target_numbers,
    token_numbers,
    without_teacher_inputs,
)
from ..errors import DistillError
from ..models.features import Features
from ..models.image_inputs import without_placeholder_labels
from ..models.type_catalog import ModelType
from ..teachers import Teacher
from ..teachers.input_keys import check_teacher_inputs


@dataclass(frozen=True)
class StepInputs:
    """The inputs of student and teacher for a batch, and their target tokens.

    The teacher's are those of the student, unless the batch has inputs of the teacher.

    inputs:           batch of the student
    targets:          T target tokens at their positions in it
    feature_tokens:   stack -> the N tokens of the student whose features are compared, see `Features.tokens`
    teacher_inputs:   batch of the teacher
    teacher_targets:  the same T target tokens at their positions in it
    feature_requests: features that the teacher returns, each with its tokens
    """

    inputs: dict
    targets: Targets
    feature_tokens: Mapping[str | None, FeatureTokens]
    teacher_inputs: dict
    teacher_targets: Targets
    feature_requests: Mapping[FeatureKey, FeatureTokens]

    @classmethod
    def read(
        cls,
        inputs: dict,
        teacher: Teacher,
        features: Features,
        model_type: ModelType,
        counts_origins: bool = False,
    ) -> "StepInputs":
        """Find the target tokens of a batch; all numbers that the host needs are read from the device at once.

        Args:
            inputs: the collator's batch; `weight` and `origin`, [B] or [B, S], become those of the target tokens.
            teacher: a prepared teacher.
            features: the terms on features.
            model_type: type of the student, which decides what a target is and whether labels are shifted.
            counts_origins: whether the target tokens of each origin are counted, if the batch has `origin`.

        Raises:
            DistillError: labels are missing or do not fit the type, the teacher cannot read its batch, or its rows have
                other target tokens.
        """
        weights, origins = inputs.get(WEIGHT), inputs.get(ORIGIN)
        inputs = {name: value for name, value in inputs.items() if name not in (WEIGHT, ORIGIN)}
        inputs = without_placeholder_labels(teacher.add_inputs(inputs), model_type.placeholders)
        shift = model_type.shifts_labels
        readable = teacher.readable_inputs()
        of_teacher = teacher_inputs(inputs, readable)
        check_teacher_inputs(teacher, inputs, of_teacher, model_type)
        numbers = token_numbers(features.numbers_to_read(inputs), features.numbers_to_read(of_teacher))
        numbers |= teacher.numbers_to_read(of_teacher, shift) | teacher_target_numbers(inputs, shift, readable)
        if origins is not None and counts_origins:
            numbers[ORIGIN] = _origin_counts(target_labels(inputs, shift), origins)
        targets = model_type.output_type.find_targets(inputs, shift, numbers)
        if "labels" in inputs:  # the shifted labels are in `targets`; a custom teacher may pass the batch to its model
            inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        feature_tokens = tokens_of_teacher = features.tokens(inputs, targets)
        batch, teacher_targets = teacher_batch(inputs, targets, shift, readable)
        if teacher_targets is not targets:
            tokens_of_teacher = _tokens_of_teacher(feature_tokens, features.tokens(batch, teacher_targets))
        requests = features.teacher_requests(tokens_of_teacher)
        weights, origins = (None if of is None else targets.gather_by_row(of) for of in (weights, origins))
        targets = replace(targets, weights=weights, origins=origins)
        teacher_targets = replace(teacher_targets, weights=weights, origins=origins)
        inputs = without_teacher_inputs(inputs, readable)
        return cls(inputs, targets, feature_tokens, batch, teacher_targets, requests)


def _origin_counts(labels: Tensor, origins: Tensor) -> Tensor:
    """Return the number of target tokens of each origin.

    Args:
        labels: of the positions, [B, S] or [B].
        origins: index of each origin, of the same shape, or [B] of each row.
    """
    is_target = labels != IGNORE_INDEX
    of_position = origins.reshape(origins.shape + (1,) * (labels.dim() - origins.dim())).expand_as(labels)
    return torch.stack([(is_target & (of_position == index)).sum() for index in range(len(ORIGINS))])


def _tokens_of_teacher(
    student: Mapping[str | None, FeatureTokens], teacher: Mapping[str | None, FeatureTokens]
) -> dict[str | None, FeatureTokens]:
    """Return the tokens of the teacher whose features are compared with those of the student, one by one.

    Raises:
        DistillError: the rows of teacher and student have different numbers of tokens.
    """
    tokens: dict[str | None, FeatureTokens] = {}
    for stack, of_student in student.items():
        of_teacher = teacher[stack]
        if isinstance(of_student, PooledRows):
            tokens[stack] = of_teacher
        elif isinstance(of_student, RowPositions):  # it compares the positions of both models when they have run
            tokens[stack] = of_student
        elif isinstance(of_teacher, Targets) and of_teacher.row_counts == of_student.row_counts:
            tokens[stack] = of_teacher
        else:
            raise DistillError(
                "Teacher and student read different inputs, whose rows have different numbers of tokens, and a loss on "
                "hidden states or attention compares token by token: remove it from `losses`, or compare the logits "
                "only."
            )
    return tokens
