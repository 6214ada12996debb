"""Which kinds of teachers are trained with the student, and which kinds cannot be combined."""

from collections.abc import Mapping
from itertools import combinations

TRAINABLE_KINDS = ("online", "mutual", "mtp")


def incompatible_teachers(kinds: Mapping[str, str]) -> list[str]:
    """Return an error message for each two teachers that cannot be combined for one student.

    Args:
        kinds: name of the teacher -> its kind.
    """
    return [
        f"{one} and {other}: {why}"
        for one, other in combinations(kinds, 2)
        if (why := _why({kinds[one], kinds[other]}, kinds[one] == kinds[other]))
    ]


def _why(kinds: set[str], same: bool) -> str:
    if "mutual" in kinds:
        return (
            "mutual learning is symmetric, and a further teacher would teach the student and not its peer. Use the "
            "kind online for the peer, or remove the other teacher"
        )
    if kinds <= {*TRAINABLE_KINDS}:
        return "both are trained jointly with the student, and only one teacher can be: train one of them first"
    if same and kinds == {"multi_view"}:
        return "the student sees one view of a batch: combine the views into one multi_view teacher"
    return ""
