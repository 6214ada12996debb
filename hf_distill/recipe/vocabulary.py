"""The section `student.from_teacher.vocab` of a recipe: vocabulary trimming. Imports no torch."""

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ..core.strict_model import StrictModel

if TYPE_CHECKING:
    from .schema import Recipe


class Vocabulary(StrictModel):
    """Vocabulary trimming: the student has some of the teacher's tokens."""

    keep: Annotated[int, Field(gt=0)] | Literal["used"] = Field(
        description="Number of tokens of the student: those that are most frequent in the training data. used: the "
        "tokens that the training and evaluation data has. Special and added tokens, those of bytes, and tokens that "
        "others are merged from are always kept."
    )

    @property
    def size(self) -> int | None:
        """Number of tokens; None if the data decides it."""
        return None if self.keep == "used" else self.keep


def vocabulary_problems(recipe: "Recipe") -> list[str]:
    """List why the vocabulary of a recipe's student cannot be trimmed, or its teachers cannot be compared over it."""
    cut, problems = recipe.student.from_teacher, list[str]()
    if cut is None or cut.vocab is None:
        return []
    for spec in recipe.all_teachers:
        if spec.kind in ("online", "mutual"):
            problems.append(
                f"student.from_teacher.vocab: a teacher of kind {spec.kind} reads the student's tokens, of which its "
                "model has others: remove vocab, or use a frozen, cached or remote teacher"
            )
        if spec.kind == "remote" and spec.api != "hidden":
            problems.append(
                f"student.from_teacher.vocab: a server with api {spec.api or 'vllm'} returns the probabilities of some "
                "ids of the full vocabulary, and those over the kept ids are not known exactly: use api hidden "
                "(hf-distill serve)"
            )
    if streamed := [name for name, source in recipe.data.sources.items() if source.streaming]:
        problems.append(
            f"data.{streamed[0]}.streaming: student.from_teacher.vocab counts the ids of all training rows before the "
            "training: set streaming to false"
        )
    return problems
