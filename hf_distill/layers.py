"""Layer mapping: which student layer learns from which teacher layer. Pure functions of two depths.

A layer index i means the output of block i, counted from 0; the embeddings have none.
"""

from collections.abc import Sequence
from typing import Any

from .errors import DistillError

Pairs = list[tuple[int, int]]
LEARNED = "learned"


def uniform(n_student: int, n_teacher: int) -> Pairs:
    """Every student layer, with teacher layer round(i * n_teacher / n_student).

    32 and 80 give 0 -> 0, 15 -> 38, 31 -> 78: the last teacher layers are never reached; `stretch` reaches them.
    """
    return [(i, min(round(i * n_teacher / n_student), n_teacher - 1)) for i in range(n_student)]


def stretch(n_student: int, n_teacher: int) -> Pairs:
    """Every student layer, first with first and last with last: round(i * (n_teacher - 1) / (n_student - 1)).

    A student of one layer learns from the last.
    """
    if n_student == 1:
        return [(0, n_teacher - 1)]
    return [(i, round(i * (n_teacher - 1) / (n_student - 1))) for i in range(n_student)]


def last(n_student: int, n_teacher: int, n: int) -> Pairs:
    """The last n layers of each, in order.

    Raises:
        DistillError: n is below 1, or one of the models has fewer layers.
    """
    if not 1 <= n <= min(n_student, n_teacher):
        raise DistillError(
            f"last:{n} needs {n} layers of each model; the student has {n_student} and the teacher {n_teacher}."
        )
    return [(n_student - n + i, n_teacher - n + i) for i in range(n)]


def check_layers(spec: Any) -> None:
    """Refuse what can be no mapping, before depths are known.

    Raises:
        DistillError: neither a known word nor pairs of indices.
    """
    if isinstance(spec, str):
        word, _, n = spec.partition(":")
        if spec in ("uniform", "stretch", LEARNED) or (word == "last" and n.isdigit() and int(n) > 0):
            return
    elif isinstance(spec, Sequence) and spec and all(_is_pair(pair) for pair in spec):
        return
    raise DistillError(
        f"layers is {spec!r}; it must be uniform, stretch, last:N, learned, or [student, teacher] pairs such as "
        "[[3, 9], [7, 19]]"
    )


def map_layers(spec: str | Sequence[Sequence[int]], n_student: int, n_teacher: int) -> Pairs:
    """The (student, teacher) pairs of a mapping: a word that `check_layers` knows, or pairs.

    `learned` starts at `stretch`, and gives its pairs.

    Raises:
        DistillError: not a mapping, or a layer that one of the models does not have.
    """
    check_layers(spec)
    if spec == "uniform":
        return uniform(n_student, n_teacher)
    if spec in ("stretch", LEARNED):
        return stretch(n_student, n_teacher)
    if isinstance(spec, str):
        return last(n_student, n_teacher, int(spec.partition(":")[2]))
    outside = [list(pair) for pair in spec if not (0 <= pair[0] < n_student and 0 <= pair[1] < n_teacher)]
    if outside:
        raise DistillError(
            f"layers pairs {outside} do not exist: a pair is [student, teacher], the student has layers 0 to "
            f"{n_student - 1} and the teacher 0 to {n_teacher - 1}."
        )
    return [(pair[0], pair[1]) for pair in spec]


def _is_pair(pair: Any) -> bool:
    integers = isinstance(pair, Sequence) and all(isinstance(i, int) and not isinstance(i, bool) for i in pair)
    return integers and len(pair) == 2
