"""Kinds of teachers, by the names that recipes use, and which of them make no sense together."""

from collections.abc import Mapping
from itertools import combinations

TRAINABLE_KINDS = ("online", "mutual", "mtp")


def incompatible_teachers(kinds: Mapping[str, str]) -> list[str]:
    """Why teachers cannot teach one student together; empty if they can.

    Args:
        kinds: name -> kind.
    """
    return [
        f"{one} and {other}: {why}"
        for one, other in combinations(kinds, 2)
        if (why := _why({kinds[one], kinds[other]}, kinds[one] == kinds[other]))
    ]


def _why(kinds: set[str], same: bool) -> str:
    if "mutual" in kinds:
        return (
            "mutual learning is symmetric, and a third model would teach the student and not its peer. Make the peer "
            "online, or leave the other teacher out"
        )
    if kinds <= {*TRAINABLE_KINDS}:
        return "both are trained beside the student, and there is room for one: train one of them first"
    if same and kinds == {"multi_view"}:
        return "the student sees one view of a batch: join their views into one"
    return ""
