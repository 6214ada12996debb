"""All filters and selections by name. Imports no torch."""

from .base import RowFilter, Selection, Step
from .code_blocks import PythonParses
from .contamination import Decontaminate
from .duplicates import ExactDuplicates, NearDuplicates
from .language import Language
from .reference import Reference
from .selections import BestOfN, MajorityVote
from .text_filters import BannedNgrams, Length, Repetition, Unfinished
from .user_functions import FunctionFilter


def name_of(step: type[Step]) -> str:
    """Return the name of a filter or selection."""
    return str(step.model_fields["name"].default)


FILTERS: dict[str, type[RowFilter]] = {
    name_of(step): step
    for step in (
        *(Length, Unfinished, Repetition, Language, ExactDuplicates, NearDuplicates, BannedNgrams, Decontaminate),
        *(Reference, PythonParses, FunctionFilter),
    )
}
SELECTIONS: dict[str, type[Selection]] = {name_of(step): step for step in (MajorityVote, BestOfN)}
