"""`build_objective`: the terms of the student for a teacher, and those of a teacher that is trained with it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..errors import did_you_mean, raise_if_any
from ..losses.objective import Term, repeated_names
from ..losses.output_types import DISTRIBUTION_OUTPUTS, OutputType
from ..teachers import MultiTeacher, RoutedTeacher, Teacher, TrainableTeacher
from ..teachers.group import teachers_by_name
from .config import DistillArguments


@dataclass(frozen=True)
class Objective:
    """The objective: the sum of the terms of the student, and of those of the trained teacher.

    student: terms of the student; with several teachers there is a term `soft_NAME` for each
    teacher: terms of the teacher's `trainable_module`; empty if no teacher is trained
    """

    student: list[Term]
    teacher: list[Term]


def build_objective(
    args: DistillArguments,
    teacher: Teacher,
    label_smoothing: float = 0.0,
    output_type: OutputType = DISTRIBUTION_OUTPUTS,
) -> Objective:
    """Build the objective of the arguments for a prepared teacher, and check it against the teacher.

    Args:
        args: the arguments of the objective.
        teacher: the teacher, or a `MultiTeacher`, of which each teacher gets its share of the soft term.
        label_smoothing: smoothing of the cross entropy on the labels, between 0 and 1.
        output_type: what the outputs of the student are, which decides the losses that the arguments leave out.

    Raises:
        DistillError: terms do not work with the teacher or the output type, or two terms have one name; the
            message names all of them.
    """
    soft, *others = args.terms(label_smoothing, output_type)
    hard = others[0] if output_type.hard_loss is not None else None
    further = others if hard is None else others[1:]
    shares: Mapping[str | None, float] = {None: 1.0} if teacher.provides_soft_labels else {}
    if isinstance(teacher, MultiTeacher):
        shares = dict(teacher.shares.items())
    default = next(iter(shares), None)
    further = [replace(term, teacher=default) if term.loss.compares and not term.teacher else term for term in further]
    problems = [_no_such_teacher(term, teacher, shares) for term in further if _reads_another(term, shares)]
    if not shares and soft.weight:
        problems.append(f"alpha is {soft.weight:g}, but {_no_soft_labels(teacher)}: set alpha to 0")
    student = [
        soft.with_share(soft.name if name is None else f"soft_{name}", name, share) for name, share in shares.items()
    ]
    student += [*([] if hard is None else [hard]), *further]
    if soft.by_origin:
        problems += _origin_problems(soft, teacher, output_type, shares)
    of_teacher: list[Term] = []
    members = teachers_by_name(teacher) if isinstance(teacher, MultiTeacher) else {None: teacher}
    for name, each in members.items():
        if isinstance(each, TrainableTeacher) and hard is None:
            problems.append(
                f"a {type(each).__name__} is trained on labels, and the student has none: use a frozen, EMA or "
                "snapshot teacher"
            )
        elif isinstance(each, TrainableTeacher):
            assert hard is not None
            of_teacher += each.derive_terms(replace(soft, weight=soft.weight * shares.get(name, 0.0)), hard)
        of_origins = [variant for term in student for variant in term.by_origin.values()]
        refusals = each.incompatible_terms([*student, *of_origins], name)
        problems += [f"{name}: {why}" if name else why for why in dict.fromkeys(refusals)]
    raise_if_any(problems + repeated_names([*student, *of_teacher]))
    return Objective(student, of_teacher)


def _origin_problems(
    soft: Term, teacher: Teacher, output_type: OutputType, shares: Mapping[str | None, float]
) -> list[str]:
    """Return why the losses cannot depend on the author of the target tokens."""
    problems = []
    if type(output_type) is not type(DISTRIBUTION_OUTPUTS):
        problems.append("by_origin is set, and the student generates no text, whose author could matter: remove it")
    if isinstance(teacher, RoutedTeacher):
        problems.append(
            "by_origin is set, and different rows have different teachers: use one teacher, or several for all rows, "
            "or remove by_origin"
        )
    if any(isinstance(each, TrainableTeacher) for each in teachers_by_name(teacher).values()):
        problems.append("by_origin is set, and the teacher is trained with the student by the same losses: remove it")
    alphas = {origin: term.weight for origin, term in soft.by_origin.items() if term.weight}
    if not shares and alphas:
        problems.append(f"by_origin sets alpha {alphas}, but {_no_soft_labels(teacher)}: set each alpha to 0")
    return problems


def _reads_another(term: Term, shares: Mapping[str | None, float]) -> bool:
    """Whether a term reads a teacher that is not one of those with soft labels."""
    return bool(term.loss.compares) and term.teacher not in shares


def _no_such_teacher(term: Term, teacher: Teacher, shares: Mapping[str | None, float]) -> str:
    """Return why a term cannot read the teacher that it names, or any."""
    if not shares:
        return f"{term.name} compares the student with a teacher, but {_no_soft_labels(teacher)}: remove it from losses"
    if not isinstance(teacher, MultiTeacher):
        return (
            f"A loss names the teacher {term.teacher!r}, but there is one teacher, without a name: leave `teacher` out "
            "of `losses`, or pass several teachers by name"
        )
    names = [str(name) for name in shares]
    return (
        f"A loss names the teacher {term.teacher!r}, which is not one of the teachers with soft labels "
        f"({', '.join(names)}){did_you_mean(str(term.teacher), names)}"
    )


def _no_soft_labels(teacher: Teacher) -> str:
    return f"{type(teacher).__name__} gives the student no soft labels"
