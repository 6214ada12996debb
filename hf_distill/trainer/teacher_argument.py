"""The `teacher` argument of a trainer: a `Teacher`, a model, the id or path of a model, or several of these by name."""

from collections.abc import Mapping
from typing import Any

from ..errors import DistillError, raise_if_any
from ..teachers import FrozenTeacher, MultiTeacher, Teacher
from .config import DistillArguments


def has_objective(teacher: Any, distill_args: DistillArguments) -> bool:
    """Return whether anything but the labels is to be learned: soft labels, other losses, or a teacher's losses."""
    teachers = teacher.values() if isinstance(teacher, Mapping) else [teacher]
    has_auxiliary_teacher = any(isinstance(one, Teacher) and not one.provides_soft_labels for one in teachers)
    return distill_args.alpha > 0 or bool(distill_args.losses) or has_auxiliary_teacher


def build_teacher(teacher: Any, distill_args: DistillArguments) -> Teacher:
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
        for name, one in teacher.items():
            try:
                teachers[name] = build_teacher(one, distill_args)
            except DistillError as error:
                problems.append(f"teachers[{name!r}]: {error}")
        raise_if_any(problems)
        return MultiTeacher(teachers)
    placement = {"deepspeed": distill_args.teacher_deepspeed, "fsdp": distill_args.teacher_fsdp}
    init_kwargs: Any = distill_args.teacher_init_kwargs or {}
    load_kwargs = {**init_kwargs, **{name: value for name, value in placement.items() if value}}
    if not isinstance(teacher, Teacher):
        return FrozenTeacher(teacher, **load_kwargs)
    if load_kwargs:
        raise DistillError(
            f"teacher_init_kwargs, teacher_deepspeed and teacher_fsdp set {sorted(load_kwargs)}, but `teacher` is a "
            "Teacher object, which is loaded already. Pass these options to the constructor of the Teacher."
        )
    return teacher
