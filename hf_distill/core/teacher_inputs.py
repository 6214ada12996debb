"""Inputs of the teacher alone: keys `teacher_<name>` of a batch, which the teacher reads under `<name>`.

They replace what the student reads of the same kind: tokens, images or audio. Inputs of other kinds are shared, and so
are the labels, unless the batch has `teacher_labels`: the same target tokens at other positions, after another prompt.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..errors import DistillError
from .aligned_inputs import aligned_names
from .targets import IGNORE_INDEX, SECOND_VIEW_KEYS, TEACHER_INDEX, TEACHER_PREFIX, Targets, target_labels

TEACHER_IDS, TEACHER_MASK, TEACHER_LABELS = (
    f"{TEACHER_PREFIX}{name}" for name in ("input_ids", "attention_mask", "labels")
)
# How the names of the inputs of a kind begin. Any other name belongs to the first kind of which the batch has an input.
_KINDS = {
    "tokens": ("input_ids", "inputs_embeds"),
    "images": ("pixel_", "image_", "video_"),
    "audio": ("input_features", "input_values", "audio_", "feature_"),
}
_TARGETS = "targets"
_TARGET_NAMES = ("labels", "shift_labels", "has_labels", "start_positions", "end_positions", "num_items_in_batch")
_ROW_COUNTS, _LABEL_SUMS, _STUDENT_SUMS = "teacher_target_tokens", "teacher_label_sums", "student_label_sums"
_OF_TEACHER = "of the teacher: "  # how the names of numbers of the teacher's batch begin


def is_teacher_key(name: str) -> bool:
    """Whether a key of a batch is an input of the teacher, or of a teacher with another tokenizer."""
    return name.startswith(TEACHER_PREFIX) and name != TEACHER_INDEX


def teacher_keys(inputs: Mapping[str, Any], readable: Collection[str] | None = None) -> list[str]:
    """Return the keys of a batch that the teacher reads under their name without `teacher_`.

    Args:
        inputs: the collator's batch.
        readable: names of the inputs that the teacher reads; None: any. A key that is itself one of these names, such
            as those of a teacher with another tokenizer, is given to the teacher as it is.
    """
    unchanged = {*aligned_names(inputs), *(readable or ())}
    return [name for name in inputs if is_teacher_key(name) and name not in unchanged]


def teacher_inputs(inputs: Mapping[str, Any], readable: Collection[str] | None = None) -> dict[str, Any]:
    """Return the batch that the teacher reads; a batch without inputs of the teacher is returned as it is.

    Args:
        inputs: the collator's batch.
        readable: see `teacher_keys`. A kind of inputs whose ids, images or audio the teacher does not read is left
            out, with its mask.
    """
    keys = teacher_keys(inputs, readable)
    if not keys:
        return dict(inputs)
    of_teacher = {key.removeprefix(TEACHER_PREFIX): inputs[key] for key in keys}
    of_student = {name: value for name, value in inputs.items() if name not in keys}
    default = next((kind for kind in _KINDS if _main_names(of_student, kind)), "tokens")
    replaced = {kind for kind in _KINDS if _main_names(of_teacher, kind)}
    if readable is not None:
        mains = {kind: _main_names(of_student, kind) for kind in _KINDS}
        replaced |= {kind for kind, names in mains.items() if names and not {*names} & {*readable}}
    has_labels = "labels" in of_teacher
    shared = {
        name: value
        for name, value in of_student.items()
        if _kind_of(name, default) not in replaced
        and not (has_labels and (name in ("labels", "shift_labels") or _is_of_decoder(name)))
    }
    if (index := shared.get(TEACHER_INDEX)) is not None and index.dim() > 1:
        shared[TEACHER_INDEX] = index[:, 0]  # rows of the student and of the teacher have different lengths
    return shared | of_teacher


def _main_names(names: Iterable[str], kind: str) -> list[str]:
    return [name for name in names if name.startswith(_KINDS[kind])]


def _kind_of(name: str, default: str) -> str:
    if name in _TARGET_NAMES or name in SECOND_VIEW_KEYS or name == TEACHER_INDEX or _is_of_decoder(name):
        return _TARGETS
    return next((kind for kind, beginnings in _KINDS.items() if name.startswith(beginnings)), default)


def _is_of_decoder(name: str) -> bool:
    return name.startswith("decoder_")


def teacher_target_numbers(
    inputs: Mapping[str, Any], shift: bool, readable: Collection[str] | None = None
) -> dict[str, Tensor]:
    """Return the numbers of a batch by which `teacher_batch` finds the target tokens; empty without `teacher_labels`.

    Args:
        inputs: the collator's batch.
        shift: whether the logits at position i predict the label at i + 1.
        readable: see `teacher_keys`.
    """
    if TEACHER_LABELS not in teacher_keys(inputs, readable):
        return {}
    labels = target_labels(teacher_inputs(inputs, readable), shift)
    student_labels = target_labels(dict(inputs), shift)
    if len(labels) != len(student_labels):
        raise DistillError(f"The batch has {len(student_labels)} rows and {len(labels)} rows for the teacher.")
    is_target = labels != IGNORE_INDEX
    return {
        _ROW_COUNTS: is_target.flatten(1).sum(1) if labels.dim() > 1 else is_target,
        _LABEL_SUMS: _row_sums(labels),
        _STUDENT_SUMS: _row_sums(student_labels),
    }


def _row_sums(labels: Tensor) -> Tensor:
    ids = labels.masked_fill(labels == IGNORE_INDEX, 0)
    return ids.flatten(1).sum(1) if labels.dim() > 1 else ids


def token_numbers(of_student: Mapping[str, Tensor], of_teacher: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return numbers of the batches of student and teacher; `teacher_batch` gives each of them its own."""
    return dict(of_student) | {f"{_OF_TEACHER}{name}": number for name, number in of_teacher.items()}


def teacher_batch(
    inputs: dict, targets: Targets, shift: bool, readable: Collection[str] | None = None
) -> tuple[dict, Targets]:
    """Return the batch that the teacher reads, and the student's target tokens at their positions in it.

    A batch without inputs of the teacher and its target tokens are returned as they are.

    Args:
        inputs: the collator's batch.
        targets: the student's target tokens, whose `numbers` have those of `teacher_target_numbers`.
        shift: whether the logits at position i predict the label at i + 1.
        readable: see `teacher_keys`.

    Raises:
        DistillError: a row of the teacher has other target tokens than that of the student.
    """
    keys = teacher_keys(inputs, readable)
    if not keys:
        return inputs, targets
    batch, numbers = teacher_inputs(inputs, readable), dict(targets.numbers)
    numbers |= {name.removeprefix(_OF_TEACHER): n for name, n in numbers.items() if name.startswith(_OF_TEACHER)}
    if TEACHER_LABELS not in keys:
        return batch, replace(targets, numbers=numbers)
    if different := _different_rows(targets, numbers):
        raise DistillError(
            f"Rows {different[:5]} of the batch have other target tokens for the teacher (teacher_labels) than for the "
            "student (labels): both must have the same tokens in the same order. For another prompt make them with "
            "tokenize_dataset(..., second_prompt=TEACHER_PROMPT)."
        )
    labels = target_labels(batch, shift)
    return batch, Targets.of_counts(
        labels, numbers[_ROW_COUNTS], targets.label_range, None, targets.label_mask, numbers
    )


def without_teacher_inputs(inputs: Mapping[str, Any], readable: Collection[str] | None = None) -> dict[str, Any]:
    """Return the batch that the student reads."""
    keys = {*teacher_keys(inputs, readable)}
    return {name: value for name, value in inputs.items() if name not in keys}


def _different_rows(targets: Targets, numbers: Mapping[str, Sequence[int]]) -> list[int]:
    student = zip(targets.row_counts or (), numbers[_STUDENT_SUMS], strict=True)
    teacher = zip(numbers[_ROW_COUNTS], numbers[_LABEL_SUMS], strict=True)
    return [row for row, (one, other) in enumerate(zip(student, teacher, strict=True)) if one != other]
