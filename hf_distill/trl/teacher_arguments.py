"""TRL's arguments for the teacher, so that the command line of a ported script does not change."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from ..errors import DistillError
from ..teachers import FrozenTeacher
from ..trainer.config import DistillArguments
from ..trainer.teacher_argument import OneTeacher, TeacherArgument


@dataclass
class TeacherArguments:
    """The fields of `GKDConfig` and `DistillationConfig` that select the teacher."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Id or path of the teacher; used if no `teacher` is passed to the trainer."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for the teacher, as a dict or its JSON."}
    )


def resolve_teacher(
    args: object, teacher: TeacherArgument | None, teachers: Mapping[str, OneTeacher] | None = None
) -> TeacherArgument | None:
    """Return the teacher of a TRL trainer; loading options of the arguments are moved to `teacher_init_kwargs`.

    Args:
        args: the trainer's arguments; if None, or without the fields of `TeacherArguments`, `teacher` is returned.
        teacher: the `teacher` argument of the trainer: a model, its id or path, a `Teacher`, or None.
        teachers: the `teachers` argument of the trainer; the arguments do not apply to several teachers.

    Raises:
        DistillError: the arguments name another teacher, or have loading options for a teacher that is loaded.
    """
    name = getattr(args, "teacher_model_name_or_path", None)
    if isinstance(teacher, str) and name is not None and teacher != name:
        raise DistillError(
            f"The trainer was given teacher={teacher!r} and teacher_model_name_or_path={name!r}: give one of them."
        )
    if teachers is not None or (teacher is None and name is None):
        return teacher
    kwargs = dict(getattr(args, "teacher_model_init_kwargs", None) or {})
    if (revision := getattr(args, "teacher_model_revision", None)) is not None:
        kwargs.setdefault("revision", revision)
    if teacher is not None and not isinstance(teacher, str):
        if kwargs:
            raise DistillError(
                f"teacher_model_init_kwargs and teacher_model_revision say how to load a teacher, {kwargs}, but the "
                f"teacher is a {type(teacher).__name__}, which is already loaded: give its id or path instead, or load "
                "it with these arguments yourself."
            )
        return teacher
    teacher = str(name) if teacher is None else teacher
    if getattr(args, "trust_remote_code", False):
        kwargs.setdefault("trust_remote_code", True)
    if not kwargs:
        return teacher
    if not isinstance(args, DistillArguments):
        return FrozenTeacher(teacher, **kwargs)
    init_kwargs = cast("dict[str, object]", args.teacher_init_kwargs or {})
    if differing := sorted(key for key in kwargs.keys() & init_kwargs.keys() if kwargs[key] != init_kwargs[key]):
        raise DistillError(
            f"{', '.join(differing)} of the teacher has one value in teacher_init_kwargs and another in "
            "teacher_model_init_kwargs, teacher_model_revision or trust_remote_code: set it once."
        )
    args.teacher_init_kwargs = kwargs | init_kwargs
    return teacher
