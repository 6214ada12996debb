"""The batch that the teacher reads where it has another prompt than the student before the same target tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import DistillError
from .aligned_inputs import has_aligned_inputs
from .targets import IGNORE_INDEX, TEACHER_INDEX, TEACHER_INPUT_KEYS, Targets, target_labels

_OF_THE_STUDENT = (
    *("input_ids", "attention_mask", "labels", "shift_labels", "position_ids", "token_type_ids"),
    *TEACHER_INPUT_KEYS,
)
_ROW_COUNTS, _LABEL_SUMS, _STUDENT_SUMS = "teacher_target_tokens", "teacher_label_sums", "student_label_sums"


def has_teacher_inputs(inputs: Mapping[str, Any]) -> bool:
    """Whether a batch has rows with another prompt for the teacher, in the student's tokens."""
    return TEACHER_INPUT_KEYS[0] in inputs and not has_aligned_inputs(inputs)


def teacher_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch that the teacher reads: `teacher_input_ids` and its companions in place of the student's.

    A batch without them is returned as it is.

    Raises:
        DistillError: some of the three keys are missing.
    """
    if not has_teacher_inputs(inputs):
        return dict(inputs)
    if missing := [key for key in TEACHER_INPUT_KEYS if key not in inputs]:
        raise DistillError(
            f"The batch has {TEACHER_INPUT_KEYS[0]}, but lacks {', '.join(missing)}: a collator must return all of "
            f"{', '.join(TEACHER_INPUT_KEYS)}, or none."
        )
    batch = {name: value for name, value in inputs.items() if name not in _OF_THE_STUDENT}
    index = batch.get(TEACHER_INDEX)
    if index is not None and index.dim() > 1:
        batch[TEACHER_INDEX] = index[:, 0]  # rows of the student and of the teacher have different lengths
    return batch | {key.removeprefix("teacher_"): inputs[key] for key in TEACHER_INPUT_KEYS}


def teacher_target_numbers(inputs: Mapping[str, Any], shift: bool) -> dict[str, Tensor]:
    """Return the numbers of a batch by which `teacher_batch` finds the target tokens; empty without teacher inputs.

    Args:
        inputs: the collator's batch.
        shift: whether the logits at position i predict the label at i + 1.
    """
    if not has_teacher_inputs(inputs):
        return {}
    labels, student_labels = target_labels(teacher_inputs(inputs), shift), target_labels(dict(inputs), shift)
    if len(labels) != len(student_labels):
        raise DistillError(f"The batch has {len(student_labels)} rows and {len(labels)} rows for the teacher.")
    is_target = labels != IGNORE_INDEX
    return {
        _ROW_COUNTS: is_target.sum(1),
        _LABEL_SUMS: labels.masked_fill(~is_target, 0).sum(1),
        _STUDENT_SUMS: student_labels.masked_fill(student_labels == IGNORE_INDEX, 0).sum(1),
    }


def teacher_batch(inputs: dict, targets: Targets, shift: bool) -> tuple[dict, Targets]:
    """Return the batch that the teacher reads, and the student's target tokens at their positions in it.

    A batch without teacher inputs and its target tokens are returned as they are.

    Args:
        inputs: the collator's batch.
        targets: the student's target tokens, whose `numbers` have those of `teacher_target_numbers`.
        shift: whether the logits at position i predict the label at i + 1.

    Raises:
        DistillError: a row of the teacher has other target tokens than that of the student.
    """
    if not has_teacher_inputs(inputs):
        return inputs, targets
    batch, numbers = teacher_inputs(inputs), targets.numbers
    if different := _different_rows(targets, numbers):
        raise DistillError(
            f"Rows {different[:5]} of the batch have other target tokens for the teacher (teacher_labels) than for the "
            "student (labels): both must have the same tokens in the same order. Make them with "
            "tokenize_dataset(..., second_prompt=TEACHER_PROMPT)."
        )
    labels = target_labels(batch, shift)
    return batch, Targets.of_counts(
        labels, numbers[_ROW_COUNTS], targets.label_range, None, targets.label_mask, numbers
    )


def without_teacher_inputs(inputs: dict) -> dict:
    """Return the batch that the student reads."""
    return {name: value for name, value in inputs.items() if name not in TEACHER_INPUT_KEYS}


def _different_rows(targets: Targets, numbers: Mapping[str, Sequence[int]]) -> list[int]:
    student = zip(targets.row_counts or (), numbers[_STUDENT_SUMS], strict=True)
    teacher = zip(numbers[_ROW_COUNTS], numbers[_LABEL_SUMS], strict=True)
    return [row for row, (one, other) in enumerate(zip(student, teacher, strict=True)) if one != other]
