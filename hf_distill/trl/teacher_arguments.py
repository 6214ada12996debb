"""TRL's arguments that name a teacher, so that the command line of a ported script stays as it is."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import DistillError
from ..teachers import FrozenTeacher
from ..trainer.config import DistillArguments


@dataclass
class TeacherArguments:
    """The fields that `GKDConfig` and `DistillationConfig` have for a teacher."""

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Id or path of the teacher; used where the trainer is given no `teacher`."}
    )
    teacher_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the teacher on the Hub."}
    )
    teacher_model_init_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for the teacher: a dict, or its JSON."}
    )


def resolve_teacher(args: Any, teacher: Any, teachers: Any = None) -> Any:
    """The teacher that a trainer of TRL's with these arguments has; how to load it goes to `teacher_init_kwargs`.

    Args:
        args: the trainer's arguments; None, or without these fields: the teacher as it is given.
        teacher: as given to the trainer: a model, its id or path, a `Teacher`, or None.
        teachers: several of them, which the arguments do not describe.

    Raises:
        DistillError: the arguments describe another teacher than the one given, or how to load one that is loaded.
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
                f"teacher_model_init_kwargs and teacher_model_revision say how to load a teacher, {kwargs}, but a "
                f"{type(teacher).__name__} was given: give its id or path instead, or load it with them yourself."
            )
        return teacher
    teacher = name if teacher is None else teacher
    if getattr(args, "trust_remote_code", False):
        kwargs.setdefault("trust_remote_code", True)
    if not kwargs:
        return teacher
    if not isinstance(args, DistillArguments):
        return FrozenTeacher(teacher, **kwargs)
    given: Any = args.teacher_init_kwargs or {}
    if differing := sorted(key for key in kwargs.keys() & given.keys() if kwargs[key] != given[key]):
        raise DistillError(
            f"{', '.join(differing)} of the teacher has one value in teacher_init_kwargs and another in "
            "teacher_model_init_kwargs, teacher_model_revision or trust_remote_code: give one of them."
        )
    args.teacher_init_kwargs = kwargs | given
    return teacher
