"""Checks for arguments of the objective that change between two trainings of one trainer."""

from transformers import TrainingArguments

from ..errors import DistillError
from .config import RUNTIME_FIELDS, DistillArguments, distill_arguments

_COMPILATION = ("torch_compile", "torch_compile_backend", "torch_compile_mode", "compile_teacher")


def objective_arguments(args: TrainingArguments) -> dict[str, object]:
    """Return copies of the arguments that define the objective, and of those that are applied once."""
    fields_of_trainer = ("label_smoothing_factor", *_COMPILATION[:3])
    return distill_arguments(args) | {name: getattr(args, name) for name in fields_of_trainer}


def changed_arguments(args: TrainingArguments, before: dict[str, object], is_distilling: bool) -> list[str]:
    """Return the names of the arguments of the objective that changed since the objective was built.

    Args:
        args: the present arguments of the trainer.
        before: `objective_arguments` when the objective was built.
        is_distilling: whether the trainer has a teacher.

    Raises:
        DistillError: a value is out of range, or an argument changed that cannot be changed any more.
    """
    current = objective_arguments(args)
    changed = [name for name in {**before, **current} if before.get(name) != current.get(name)]
    if not changed:
        return []
    if isinstance(args, DistillArguments):
        DistillArguments.__post_init__(args)  # parses JSON, and checks the ranges
    if teacher_fields := [name for name in changed if name.startswith("teacher_")]:
        raise DistillError(
            f"{teacher_fields} changed after the teacher was loaded. Create a new trainer with these arguments."
        )
    if compilation := [name for name in changed if name in _COMPILATION]:
        raise DistillError(
            f"{compilation} changed after the trainer was created, which has compiled its models by then. Create a "
            "new trainer with these arguments."
        )
    unused = [name for name in changed if name not in ("label_smoothing_factor", "stop_on_signal", *RUNTIME_FIELDS)]
    if unused and not is_distilling:
        raise DistillError(
            f"{unused} changed, and there is no teacher. Create a trainer with `teacher=` and alpha above 0."
        )
    return changed
