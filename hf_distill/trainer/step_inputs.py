"""`StepInputs`: what student and teacher read of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass

from ..core.signals import FeatureKey
from ..core.targets import FeatureTokens, Targets
from ..core.teacher_inputs import teacher_batch, teacher_inputs, teacher_target_numbers, without_teacher_inputs
from ..models.features import Features
from ..models.model_types import ModelType
from ..teachers import Teacher


@dataclass(frozen=True)
class StepInputs:
    """The inputs of student and teacher for a batch, and their target tokens.

    The teacher's are those of the student, unless the batch has rows for the teacher alone.

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
    def read(cls, inputs: dict, teacher: Teacher, features: Features, model_type: ModelType) -> "StepInputs":
        """Find the target tokens of a batch; all numbers that the host needs are read from the device at once.

        Args:
            inputs: the collator's batch.
            teacher: a prepared teacher.
            features: the terms on features.
            model_type: type of the student, which decides what a target is and whether labels are shifted.

        Raises:
            DistillError: labels are missing or do not fit the type, or the teacher's rows have other target tokens.
        """
        inputs, shift = teacher.add_inputs(inputs), model_type.shifts_labels
        of_teacher = teacher_inputs(inputs)
        numbers = features.numbers_to_read(of_teacher) | teacher.numbers_to_read(of_teacher, shift)
        numbers |= teacher_target_numbers(inputs, shift)
        targets = model_type.output_type.find_targets(inputs, shift, numbers)
        if "labels" in inputs:  # the shifted labels are in `targets`; a custom teacher may pass the batch to its model
            inputs = {name: value for name, value in inputs.items() if name != "shift_labels"}
        feature_tokens = tokens_of_teacher = features.tokens(inputs, targets)
        batch, teacher_targets = teacher_batch(inputs, targets, shift)
        if teacher_targets is not targets:
            tokens_of_teacher = features.tokens(batch, teacher_targets)
        requests = features.teacher_requests(tokens_of_teacher)
        return cls(without_teacher_inputs(inputs), targets, feature_tokens, batch, teacher_targets, requests)
