"""The filter that compares completions with a reference answer. Imports no torch."""

from collections.abc import Callable
from typing import Literal

from pydantic import Field

from .answers import AnswerStep
from .base import RowFilter
from .rows import Row, column, completion_text


class Reference(AnswerStep, RowFilter):
    """Keeps completions whose answer equals the reference answer of their row.

    Completions without an answer are removed. A row whose reference answer cannot be read, or for which the comparison
    takes too long, is set aside.
    """

    name: Literal["reference"] = "reference"
    column: str = Field(
        "reference",
        description="Column with the reference answer, or a list of possible answers: a column of the data source, or "
        "reference, its completion. Default: reference.",
    )
    reference_after: str | None = Field(
        None,
        min_length=1,
        description="The reference answer follows the last occurrence of this text in the column, such as '####' in "
        "GSM8K. Default (null): the whole text is the answer.",
    )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads in addition to `prompt`, `completion` and `source`."""
        return (self.column,)

    def start(self) -> Callable[[Row], bool]:
        """Return the function that judges the rows of one data set in order."""
        self.check_thread()
        return self.keep

    def keep(self, row: Row) -> bool:
        """Whether the row is kept."""
        value = column(row, self.column, self.name)
        values = value if isinstance(value, list | tuple) else [value]
        references = [self.read_reference(item, self.reference_after) for item in values]
        if not references:
            raise ValueError("the list of reference answers is empty")
        answer = self.read_answer(completion_text(row))
        return answer is not None and any(self.is_same(reference, answer) for reference in references)
