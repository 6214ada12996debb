"""The `teacher` argument of a trainer: a `Teacher`, a model, the id or path of a model, or several of these by name."""

import os
from collections.abc import Mapping
from typing import Any, cast

from torch import nn
from transformers import TrainingArguments
from transformers.utils import logging

from ..core.teacher_inputs import TEACHER_IDS
from ..data.teacher_column import check_teacher_column
from ..errors import DistillError, raise_if_any
from ..models.model_types import model_type_of, unwrap_parallel
from ..teachers import (
    CrossTokenizerTeacher,
    FrozenTeacher,
    MultiTeacher,
    NullTeacher,
    RoutedTeacher,
    Teacher,
)
from ..teachers.group import TeacherGroup, find_trained_teacher, teachers_by_name
from ..teachers.input_keys import check_columns
from ..teachers.pretrained import as_path
from ..teachers.sharing import shared_with_teacher
from .config import DistillArguments

logger = logging.get_logger(__name__)
OneTeacher = Teacher | nn.Module | str | os.PathLike[str]
TeacherArgument = OneTeacher | Mapping[str, OneTeacher]


def choose_teacher(
    teacher: TeacherArgument | None,
    teachers: Mapping[str, OneTeacher] | None,
    distill_args: DistillArguments,
    has_weights: bool = False,
) -> Teacher | None:
    """Return the teacher of a trainer; None if it trains on the labels alone with the loss of the Trainer.

    Args:
        teacher: the `teacher` argument of the trainer.
        teachers: the `teachers` argument of the trainer.
        distill_args: the arguments of the objective, and how to load a model.
        has_weights: whether the training rows have weights, so that the labels alone need the loss of this package.

    Raises:
        DistillError: both are set, losses or options of a teacher are set without one, or the teacher cannot
            be built.
    """
    if teacher is not None and teachers is not None:
        raise DistillError("Both `teacher` and `teachers` are set. Pass all teachers in `teachers`, by name.")
    teacher = teacher if teachers is None else teachers
    if teacher is None and distill_args.losses:
        raise DistillError("`losses` are set but there is no teacher. Pass `teacher=` to the trainer.")
    if teacher is None and (unused := _options_of_teacher(distill_args)):
        raise DistillError(
            f"{', '.join(unused)} is set but there is no teacher. Pass `teacher=` to the trainer, or remove "
            f"{'it' if len(unused) == 1 else 'them'}."
        )
    members = teacher.values() if isinstance(teacher, Mapping) else [teacher]
    has_teacher_losses = any(isinstance(member, Teacher) and not member.provides_soft_labels for member in members)
    if not (distill_args.uses_soft_labels or distill_args.losses or has_teacher_losses):
        return NullTeacher() if has_weights else None
    if teacher is None:
        logger.warning_once(
            "There is no teacher, so this trains on the labels alone. Pass `teacher=` to the trainer to distill."
        )
        return NullTeacher() if has_weights else None
    built = build_teacher(teacher, distill_args)
    return built if distill_args.cross_tokenizer is None else with_other_tokenizer(built)


def _options_of_teacher(distill_args: DistillArguments) -> list[str]:
    """Return the arguments that are set and concern a teacher alone."""
    names = ("teacher_init_kwargs", "teacher_deepspeed", "teacher_fsdp", "compile_teacher")
    return [name for name in names if getattr(distill_args, name)]


def with_other_tokenizer(teacher: Teacher, name: str | None = None) -> Teacher:
    """Return a teacher, or each of a group, as one that reads the text in its own tokens.

    Args:
        teacher: a teacher, or a group of teachers, whose members are replaced.
        name: name of the teacher if there are several.

    Raises:
        DistillError: a teacher reads the student's tokens.
    """
    if isinstance(teacher, TeacherGroup):
        teacher.teachers = {name: with_other_tokenizer(member, name) for name, member in teacher.teachers.items()}
        return teacher
    return teacher if isinstance(teacher, CrossTokenizerTeacher) else CrossTokenizerTeacher(teacher, name=name)


def cross_tokenizer_teachers(teacher: Teacher | None) -> list[CrossTokenizerTeacher]:
    """Return the teachers with another tokenizer, of one teacher or a group."""
    members = teacher.teachers.values() if isinstance(teacher, TeacherGroup) else [teacher]
    return [member for member in members if isinstance(member, CrossTokenizerTeacher)]


def build_teacher(teacher: TeacherArgument, distill_args: DistillArguments) -> Teacher:
    """Return the `Teacher` for what was passed to the trainer.

    Args:
        teacher: a `Teacher`, a model, the id or path of a model, or several of these by name.
        distill_args: their `teacher_*` fields say how to load a model.

    Raises:
        DistillError: a model cannot be loaded, or `teacher_*` fields are set although a `Teacher` was passed.
    """
    if isinstance(teacher, Mapping):
        problems: list[str] = []
        teachers = {}
        for name, member in teacher.items():
            try:
                teachers[name] = build_teacher(member, distill_args)
            except DistillError as error:
                problems.append(f"teachers[{name!r}]: {error}")
        raise_if_any(problems)
        return MultiTeacher(teachers)
    placement = {"deepspeed": distill_args.teacher_deepspeed, "fsdp": distill_args.teacher_fsdp}
    load_kwargs = cast("dict[str, Any]", distill_args.teacher_init_kwargs or {})
    load_kwargs = load_kwargs | {name: value for name, value in placement.items() if value}
    if not isinstance(teacher, Teacher):
        return FrozenTeacher(as_path(teacher), **load_kwargs)
    if load_kwargs:
        raise DistillError(
            f"teacher_init_kwargs, teacher_deepspeed and teacher_fsdp set {sorted(load_kwargs)}, but `teacher` is a "
            "Teacher object, which is loaded already. Pass these options to the constructor of the Teacher."
        )
    return teacher


def leave_devices_to_teacher(teacher: Teacher | None, args: object) -> None:
    """Train on one GPU if a process without a launcher sees several and a teacher is on another one than the student.

    A Trainer would use DataParallel over all GPUs. It reads `n_gpu` when it is created.

    Args:
        teacher: the teacher, before it is prepared; None if there is none.
        args: the training arguments.
    """
    if teacher is None or not isinstance(args, TrainingArguments) or args.n_gpu < 2:
        return
    device = args.device
    if any(
        isinstance(member, FrozenTeacher) and member.is_elsewhere(device)
        for member in teachers_by_name(teacher).values()
    ):
        logger.warning_once(f"The student is trained on {device} alone, because a teacher is on another device.")
        args._n_gpu = 1


def prepare_teacher(
    teacher: Teacher,
    student: nn.Module,
    args: TrainingArguments,
    tokenizer: object,
    datasets: Mapping[str, object],
    makes_students: bool,
    collator: object = None,
) -> None:
    """Prepare a teacher, and check that it works with the student, the data and the arguments.

    Args:
        teacher: the teacher.
        student: the model that is trained.
        args: the training arguments, of which a trained teacher may change some.
        tokenizer: the tokenizer or processor of the trainer.
        datasets: the data sets of the trainer, by the name of its argument.
        makes_students: whether the trainer has a `model_init`.
        collator: the collator of the trainer.

    Raises:
        DistillError: it does not work with them; the message names every reason.
    """
    parameters = dict(student.named_parameters())
    trained = [name for name, parameter in parameters.items() if parameter.requires_grad]
    raise_if_any(unsupported_output_type(teacher, student))
    teacher.prepare(unwrap_parallel(student), args.device, tokenizer)
    if teacher.other_tokens is not None and lacks_teacher_tokens(datasets, collator):
        raise DistillError(teacher.other_tokens.reason)
    if shared := shared_with_teacher(student, trained, teacher):
        for name in trained:  # a frozen teacher froze the parameters that it shares with the student
            parameters[name].requires_grad_(True)
        raise_if_any(shared)
    if isinstance(teacher, RoutedTeacher) and teacher.sources is None:
        check_teacher_column(datasets, teacher.names)
    for name, rows in datasets.items():
        check_columns(teacher, _columns(rows), name, args.remove_unused_columns)
        teacher.check_data(rows, name)
    raise_if_any(incompatible_teacher(teacher, args, makes_students))
    if (trained_teacher := find_trained_teacher(teacher)) is not None:
        trained_teacher.adjust_arguments(args)


def unsupported_output_type(teacher: Teacher, student: nn.Module) -> list[str]:
    """Return why a teacher cannot teach a student that does not predict the same ids or classes in each batch."""
    model_type = model_type_of(student)
    if model_type.has_fixed_classes:
        return []
    kinds = {type(one).__name__ for one in (teacher, *teachers_by_name(teacher).values()) if not one.any_output_type}
    return [
        f"the student is {model_type.with_article}, and a {kind} has targets that are tokens or classes only: use a "
        "frozen, EMA, snapshot, adapter-base or peer teacher, or several of these"
        for kind in sorted(kinds)
    ]


def lacks_teacher_tokens(datasets: Mapping[str, Any], collator: object) -> bool:
    """Whether it is certain that no batch has the tokens of the teacher, `teacher_input_ids`.

    Args:
        datasets: the data sets of the trainer, by the name of its argument.
        collator: the collator; one that is not of transformers may make the tokens.
    """
    module = getattr(collator, "__module__", None) or type(collator).__module__
    rows = [each for each in datasets.values() if each is not None]
    return module.partition(".")[0] == "transformers" and bool(rows) and all(map(_lacks_teacher_tokens, rows))


def _lacks_teacher_tokens(rows: Any) -> bool:
    if getattr(rows, "format", {}).get("type") == "custom":  # a transform makes the columns
        return False
    columns = _columns(rows)
    return bool(columns) and TEACHER_IDS not in columns


def _columns(rows: Any) -> list[str]:
    """Return the names of the columns of a data set or a list of rows; empty if they are unknown."""
    if isinstance(rows, list):
        return [*rows[0]] if rows and isinstance(rows[0], Mapping) else []
    return list(getattr(rows, "column_names", None) or ())


def incompatible_teacher(teacher: Teacher, args: TrainingArguments, makes_students: bool) -> list[str]:
    """Return why a prepared teacher does not work with the arguments, if it is trained, or with `model_init`."""
    trained = find_trained_teacher(teacher)
    problems = [] if trained is None else trained.check_arguments(args)
    if args.world_size > 1 and teacher.max_wait_seconds >= args.ddp_timeout:
        problems.append(
            f"the teacher may wait {teacher.max_wait_seconds:g} s for its server (retry_seconds + 2 * timeout), and "
            f"the other processes abort without a checkpoint after {args.ddp_timeout} s (ddp_timeout). Lower "
            "retry_seconds, or raise ddp_timeout"
        )
    if makes_students and teacher.tied_to_student:
        problems.append(
            f"model_init makes a new student for each training, but {type(teacher).__name__} works with one "
            "student only. Pass model instead of model_init"
        )
    return problems
