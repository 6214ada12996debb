"""Checks of recipes whose teachers have another tokenizer than the student. Imports no torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .losses import tokenizer_problems
from .models import CROSS_TOKENIZER_KINDS, TeacherSpec

if TYPE_CHECKING:
    from .schema import Recipe


def cross_tokenizer_problems(recipe: "Recipe") -> list[str]:
    """Describe what does not fit `distill.cross_tokenizer`, or needs it; empty if everything fits."""
    problems = [problem for loss in recipe.losses for problem in tokenizer_problems(loss, recipe.is_cross_tokenizer)]
    teachers = (
        {"teacher": recipe.teacher} if recipe.teacher else {f"teachers.{spec.name}": spec for spec in recipe.teachers}
    )
    for location, spec in teachers.items():
        problems += _of_teacher(recipe, location, spec.effective)
    if any("cross_tokenizer" in stage.distill for stage in recipe.stages):
        problems.append(f"stages: {_NO_STAGES}")
    if not recipe.is_cross_tokenizer:
        return problems
    if recipe.stages:
        problems.append(f"distill.cross_tokenizer: {_NO_STAGES}")
    if recipe.student.from_teacher:
        problems.append(
            "student.from_teacher: a student that is pruned from its teacher has the teacher's tokenizer: set "
            "student.model, or remove distill.cross_tokenizer"
        )
    return problems


_NO_STAGES = (
    "the student of a stage has the tokenizer of its teacher, the student of the stage before it: distill the first "
    "student with cross_tokenizer in one recipe, and the others from it in a second one"
)


def _of_teacher(recipe: "Recipe", location: str, spec: TeacherSpec) -> Iterator[str]:
    """Yield the problems of one teacher."""
    named = spec.tokenizer or (spec.source and spec.source.tokenizer)
    if not recipe.is_cross_tokenizer:
        if named:
            yield (
                f"{location}.tokenizer is {named!r}, and without distill.cross_tokenizer teacher and student have one "
                "tokenizer: set distill.cross_tokenizer to alm, projected_kl or uld, or remove tokenizer"
            )
        return
    if spec.kind not in CROSS_TOKENIZER_KINDS:
        yield (
            f"{location}.kind is {spec.kind}, a teacher that has the student's tokenizer: remove "
            f"distill.cross_tokenizer, or use one of {', '.join(CROSS_TOKENIZER_KINDS)}"
        )
        return
    if spec.prompt and recipe.on_policy:
        yield (
            f"{location}.prompt does not work with distill.cross_tokenizer and on_policy: the teacher reads the prompt "
            "and the completion of the student in its own tokens. Remove prompt"
        )
    if spec.tokenizer_model is None:
        yield (
            f"{location}.tokenizer: the tokenizer of a {spec.kind} teacher is not known: set it to the folder or id of "
            "the teacher's model"
        )
