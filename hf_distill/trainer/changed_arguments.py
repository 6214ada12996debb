"""Arguments of the objective that are changed between two trainings: taken, or refused."""

from typing import Any

from ..errors import DistillError
from .config import RUNTIME_FIELDS, DistillArguments, distill_arguments


def objective_arguments(args: Any) -> dict[str, Any]:
    """Copies of the arguments that the objective is made of."""
    return distill_arguments(args) | {"label_smoothing_factor": args.label_smoothing_factor}


def changed_arguments(args: Any, before: dict[str, Any], is_distilling: bool) -> list[str]:
    """Names of what was changed in a trainer's arguments since the objective was made of them.

    Args:
        args: the trainer's arguments.
        before: `objective_arguments` that the objective was made of.
        is_distilling: whether there is a teacher.

    Raises:
        DistillError: a value out of range, or a change that cannot be taken any more.
    """
    now = objective_arguments(args)
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not changed:
        return []
    if isinstance(args, DistillArguments):
        DistillArguments.__post_init__(args)  # reads JSON, and refuses what is out of range
    if fixed := [name for name in changed if name.startswith("teacher_")]:
        raise DistillError(f"{fixed} changed after the teacher was loaded: make a new trainer with these arguments.")
    unused = [name for name in changed if name not in ("label_smoothing_factor", "stop_on_signal", *RUNTIME_FIELDS)]
    if unused and not is_distilling:
        raise DistillError(f"{unused} changed, and there is no teacher: pass one, with alpha above 0.")
    return changed
