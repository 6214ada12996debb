"""Checks of the inputs of the teacher in a batch: those that it needs, and those that it does not read."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..core.targets import TEACHER_PREFIX
from ..core.teacher_inputs import TEACHER_IDS, TEACHER_LABELS, TEACHER_MASK, teacher_keys
from ..errors import DistillError, nearest
from ..models.model_call import input_names
from ..models.model_types import unwrap_model
from ..models.type_catalog import SEQ2SEQ, SPEECH_SEQ2SEQ, ModelType
from .base import Teacher
from .group import teachers_by_name

_MAIN_INPUTS = ("input_ids", "inputs_embeds", "inputs", "input_features", "input_values", "pixel_values")
_SIZES = ("image_size", "num_channels", "num_mel_bins", "feature_size", "max_length")  # of a config
_COLLATOR = (
    "A collator that returns it is hf_distill.DualProcessorCollator(student_processor, teacher_processor), which makes "
    "it from the columns `image`, `audio` or `text`."
)


def check_teacher_inputs(
    teacher: Teacher, inputs: Mapping[str, Any], of_teacher: Mapping[str, Any], model_type: ModelType
) -> None:
    """Check that a teacher can read its batch.

    Args:
        teacher: a prepared teacher.
        inputs: the collator's batch.
        of_teacher: the batch that the teacher reads; see `core.teacher_inputs`.
        model_type: type of the student.

    Raises:
        DistillError: an input is missing, is not read by the teacher, or has another number of rows.
    """
    if teacher.other_tokens is not None and TEACHER_IDS not in inputs:
        raise DistillError(f"{teacher.other_tokens.reason} The batch has {_listed(inputs)}.")
    readable = teacher.readable_inputs()
    keys = teacher_keys(inputs, readable)
    if keys:
        _check_is_read(teacher, keys, readable)
        _check_tokens(inputs, keys, model_type)
        _check_rows(inputs, of_teacher, model_type)
    for each in teachers_by_name(teacher).values():
        if isinstance(each.model, nn.Module):
            _check_main_input(each, inputs, of_teacher)


def check_columns(teacher: Teacher, columns: Iterable[str], name: str, are_unused_removed: bool) -> None:
    """Check the columns `teacher_<name>` of a data set; those that no teacher reads are left to the Trainer.

    Args:
        teacher: a prepared teacher.
        columns: names of the columns.
        name: name of the data set in the error.
        are_unused_removed: whether the Trainer removes columns that no model reads.

    Raises:
        DistillError: a teacher cannot read inputs of its own; or the name of a column that would be removed is close to
            that of an input of the teacher.
    """
    readable = teacher.readable_inputs()
    readable_keys = {f"{TEACHER_PREFIX}{each}" for each in (*(readable or ("input_ids", "attention_mask")), "labels")}
    keys = teacher_keys(dict.fromkeys(columns), teacher.input_names())
    _check_reads_inputs(teacher, [key for key in keys if key in readable_keys], name)
    if readable is None or not are_unused_removed:
        return
    for key in keys:
        if key not in readable_keys and (closest := nearest(key.removeprefix(TEACHER_PREFIX), (*readable, "labels"))):
            raise DistillError(
                f"{name} has the column {key}, and the teacher reads no input of this name: rename it to "
                f"{TEACHER_PREFIX}{closest}, or remove it."
            )


def _check_reads_inputs(teacher: Teacher, keys: list[str], name: str) -> None:
    """Refuse inputs of the teacher if a teacher reads the student's batch.

    Args:
        teacher: the teacher.
        keys: names of columns or keys with inputs of the teacher.
        name: name of the data set or batch in the error.

    Raises:
        DistillError: it is trained with the student, or gives the student another view of the batch.
    """
    if not keys:
        return
    for each in teachers_by_name(teacher).values():
        if not each.reads_teacher_inputs or (TEACHER_LABELS in keys and not each.reads_teacher_labels):
            what = "another prompt for the teacher" if TEACHER_LABELS in keys else "inputs of the teacher"
            raise DistillError(
                f"{name} has {keys[0]}, {what}, and a {type(each).__name__} reads the student's batch: remove these "
                "columns, or use a frozen, cached, remote, EMA, snapshot or adapter-base teacher."
            )


def other_size_problem(
    teacher: Teacher, student: nn.Module, inputs: Mapping[str, Any], of_teacher: Mapping[str, Any]
) -> str | None:
    """Return why a teacher failed on a batch, if its processor is another one than the student's; None: unknown.

    Args:
        teacher: the teacher, whose forward raised an error.
        student: the student, without wrappers.
        inputs: the batch of the student.
        of_teacher: the batch of the teacher.
    """
    config = getattr(student, "config", None)
    for each in teachers_by_name(teacher).values():
        model = unwrap_model(each.model) if isinstance(each.model, nn.Module) else None
        name = getattr(model, "main_input_name", None)
        if model is None or name in (None, "input_ids") or of_teacher.get(name) is not inputs.get(name):
            continue
        configs = (getattr(model, "config", None), config)
        sizes = [(size, *(getattr(one, size, None) for one in configs)) for size in _SIZES]
        different = [f"{size} is {t} for the teacher and {s} for the student" for size, t, s in sizes if t != s]
        if different:
            return (
                f"The teacher, a {type(model).__name__}, cannot read `{name}` of the student: {', '.join(different)} "
                f"in their configs. Give it `{TEACHER_PREFIX}{name}`, made by its processor. {_COLLATOR}"
            )
    return None


def foreign_key_problem(inputs: Mapping[str, Any], student: nn.Module) -> str | None:
    """Return why a batch with inputs of a teacher cannot be trained on without one; None if it has none."""
    if keys := teacher_keys(inputs, input_names(student)):
        return (
            f"The batch has {', '.join(keys)}, inputs of a teacher, and there is no teacher: pass `teacher=` to the "
            "trainer (with alpha=0 it trains on the labels alone), or use a collator that makes the student's inputs "
            "only."
        )
    return None


def _check_is_read(teacher: Teacher, keys: list[str], readable: Collection[str] | None) -> None:
    """Check that the teacher reads all of its inputs."""
    _check_reads_inputs(teacher, keys, "The batch")
    if readable is None:
        return
    names, readable_names = (
        {key: key.removeprefix(TEACHER_PREFIX) for key in keys},
        {*readable, "labels", "shift_labels"},
    )
    if unread := [key for key, name in names.items() if name not in readable_names]:
        raise DistillError(
            f"The batch has {', '.join(unread)}, and {_name_of(teacher)} reads no "
            f"{', '.join(names[key] for key in unread)}. It reads {_listed(readable)}: remove "
            f"{'this key' if len(unread) == 1 else 'these keys'}, or name {'it' if len(unread) == 1 else 'them'} "
            f"{TEACHER_PREFIX}NAME after one of these inputs."
        )


def _check_tokens(inputs: Mapping[str, Any], keys: list[str], model_type: ModelType) -> None:
    """Check that tokens of the teacher have a mask, and labels if each label is that of a token."""
    if TEACHER_IDS not in keys:
        return
    if model_type.output_type.compares_positions:
        raise DistillError(
            f"The batch has {TEACHER_IDS}, and the outputs of a {model_type.name} are distributions over the positions "
            "of the tokens, which must be the same for both models: remove it, and use a teacher with the student's "
            "tokenizer."
        )
    labels = next((inputs[name] for name in ("labels", "shift_labels") if inputs.get(name) is not None), None)
    has_decoder = model_type in (SEQ2SEQ, SPEECH_SEQ2SEQ)
    labels_tokens = isinstance(labels, Tensor) and labels.dim() > 1 and not labels.is_floating_point()
    needed = [TEACHER_MASK, *([TEACHER_LABELS] if labels_tokens and not has_decoder else [])]
    if missing := [key for key in needed if key not in keys]:
        raise DistillError(
            f"The batch has {TEACHER_IDS}, but lacks {', '.join(missing)}: a collator must return all of "
            f"{', '.join([TEACHER_IDS, *needed])}, or none."
        )


def _check_rows(inputs: Mapping[str, Any], of_teacher: Mapping[str, Any], model_type: ModelType) -> None:
    """Check that the teacher has as many rows as the student."""
    labels = next((inputs[name] for name in model_type.output_type.label_names if inputs.get(name) is not None), None)
    name = next((name for name in _MAIN_INPUTS if isinstance(of_teacher.get(name), Tensor)), None)
    if name is None or not isinstance(labels, Tensor) or labels.dim() == 0:
        return
    if len(of_teacher[name]) != len(labels):
        raise DistillError(
            f"The batch has {len(labels)} rows and {len(of_teacher[name])} rows for the teacher "
            f"({TEACHER_PREFIX}{name}): a collator must make one row of the teacher for each row of the student, in "
            "the same order."
        )


def _check_main_input(teacher: Teacher, inputs: Mapping[str, Any], of_teacher: Mapping[str, Any]) -> None:
    """Check that the batch of a teacher with a model has what the model predicts from."""
    model, accepted = unwrap_model(teacher.model), teacher.readable_inputs()
    name = getattr(model, "main_input_name", None)
    if accepted is None or name not in accepted or name in of_teacher:
        return
    if any(other in of_teacher and other in accepted for other in (*_MAIN_INPUTS, "encoder_outputs")):
        return
    has_same_key = name in inputs
    raise DistillError(
        f"The teacher, a {type(model).__name__}, reads `{name}`, and its batch lacks it: the collator returned "
        f"{_listed(inputs)}. Give the teacher `{TEACHER_PREFIX}{name}`"
        f"{', because its other inputs replace those of the student' if has_same_key else ''}. {_COLLATOR}"
    )


def _name_of(teacher: Teacher) -> str:
    models = [each.model for each in teachers_by_name(teacher).values() if isinstance(each.model, nn.Module)]
    names = dict.fromkeys(type(unwrap_model(model)).__name__ for model in models)
    return f"the teacher, a {' or '.join(names)}," if names else f"a {type(teacher).__name__}"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
