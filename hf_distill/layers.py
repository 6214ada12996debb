"""Layer mappings: which student layer is compared with which teacher layer, as functions of the two depths.

Index i is the output of layer i, counted from 0. The output of the embeddings has no index.
"""

from collections.abc import Sequence

from .errors import DistillError

Pairs = list[tuple[int, int]]
LEARNED, KEPT, AUTO = "learned", "kept", "auto"


def uniform(n_student: int, n_teacher: int) -> Pairs:
    """Pair each student layer i with the teacher layer round(i * n_teacher / n_student).

    32 and 80 layers give 0 -> 0, 15 -> 38, 31 -> 78. The last teacher layers have no pair; with `stretch` they have.

    Args:
        n_student: number of student layers.
        n_teacher: number of teacher layers.

    Returns:
        (student layer, teacher layer) of each student layer.
    """
    return [(i, min(round(i * n_teacher / n_student), n_teacher - 1)) for i in range(n_student)]


def stretch(n_student: int, n_teacher: int) -> Pairs:
    """Pair each student layer i with the teacher layer round(i * (n_teacher - 1) / (n_student - 1)).

    The first layers and the last layers are paired (endpoint-aligned). The layer of a one-layer student is paired with
    the last teacher layer.

    Args:
        n_student: number of student layers.
        n_teacher: number of teacher layers.

    Returns:
        (student layer, teacher layer) of each student layer.
    """
    if n_student == 1:
        return [(0, n_teacher - 1)]
    return [(i, round(i * (n_teacher - 1) / (n_student - 1))) for i in range(n_student)]


def last(n_student: int, n_teacher: int, n: int) -> Pairs:
    """Pair the last n layers of both models, in order.

    Args:
        n_student: number of student layers.
        n_teacher: number of teacher layers.
        n: number of pairs.

    Returns:
        n pairs (student layer, teacher layer).

    Raises:
        DistillError: n is below 1, or one of the models has fewer layers.
    """
    if not 1 <= n <= min(n_student, n_teacher):
        raise DistillError(
            f"last:{n} needs {n} layers of each model, and the student has {n_student} and the teacher {n_teacher}: "
            f"give a number from 1 to {min(n_student, n_teacher)}."
        )
    return [(n_student - n + i, n_teacher - n + i) for i in range(n)]


def check_layers(spec: object) -> None:
    """Check the form of a layer mapping, before the depths of the models are known.

    Args:
        spec: "auto", "kept", "uniform", "stretch", "last:N", "learned", or a list of [student layer, teacher layer].

    Raises:
        DistillError: it is none of these.
    """
    if isinstance(spec, str):
        word, _, n = spec.partition(":")
        if spec in ("uniform", "stretch", LEARNED, KEPT, AUTO) or (word == "last" and n.isdigit() and int(n) > 0):
            return
    elif isinstance(spec, Sequence) and spec and all(_is_pair(pair) for pair in spec):
        return
    raise DistillError(
        f"layers is {spec!r}; it must be kept, uniform, stretch, last:N, learned, or [student, teacher] pairs such "
        "as [[3, 9], [7, 19]]"
    )


def map_layers(
    spec: str | Sequence[Sequence[int]], n_student: int, n_teacher: int, kept: Sequence[int] | None = None
) -> Pairs:
    """Return the (student layer, teacher layer) pairs of a layer mapping.

    Args:
        spec: see `check_layers`. "kept" pairs each layer of a pruned student with the teacher layer that it was. "auto"
            is "kept" for a pruned student and "stretch" for others. A "learned" mapping starts at "auto" and has its
            pairs.
        n_student: number of student layers.
        n_teacher: number of teacher layers.
        kept: the teacher's layers that a pruned student consists of; None if it is not known.

    Raises:
        DistillError: `spec` is no layer mapping, one of the models does not have a layer, or it is "kept" and the
            layers that were kept are not known.
    """
    check_layers(spec)
    if spec == KEPT and kept is None:
        raise DistillError(
            "layers is kept, and the student was not made from this teacher by pruning in this process, so which "
            "layers it kept is not known: use stretch, or [student, teacher] pairs."
        )
    if spec in (KEPT, AUTO, LEARNED) and kept is not None:
        return list(enumerate(kept))
    if spec == "uniform":
        return uniform(n_student, n_teacher)
    if spec in ("stretch", AUTO, LEARNED):
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


def _is_pair(pair: object) -> bool:
    if not isinstance(pair, Sequence) or len(pair) != 2:
        return False
    return all(isinstance(i, int) and not isinstance(i, bool) for i in pair)
