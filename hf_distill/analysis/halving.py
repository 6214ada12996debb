"""Successive halving (1502.07943): all candidates train a little, the better ones go on, one trains to the end."""

from math import ceil, log

from ..errors import DistillError


def rungs(candidates: int, steps: int, eta: int = 2) -> list[tuple[int, int]]:
    """(candidates that train, step up to which) of each rung; what was trained before is not trained again.

    The last rung has one candidate and all steps; each one before it eta times as many, and eta times fewer. Of 8
    candidates at eta 2: 8 to 1/8, 4 to 1/4, 2 to 1/2, 1 to the end: as many steps as 2.5 whole runs.

    Args:
        candidates: how many there are.
        steps: of a whole run.
        eta: one of so many goes on.

    Raises:
        DistillError: no candidate, an eta below 2, or too few steps for the first rung.
    """
    if candidates < 1 or eta < 2:
        raise DistillError(f"There are {candidates} candidates and eta is {eta}: at least 1, and at least 2.")
    count = ceil(round(log(candidates, eta), 9))
    found = [(min(candidates, eta**i), max(1, round(steps / eta**i))) for i in range(count + 1)][::-1]
    if steps < 2 * eta**count:
        raise DistillError(
            f"{steps} steps are too few for {candidates} candidates: the first of {count + 1} rungs would have "
            f"{steps / eta**count:.1f}. Set train.max_steps to {2 * eta**count} or more, or give fewer candidates."
        )
    return found


def cost(plan: list[tuple[int, int]]) -> int:
    """Steps of a whole search: each candidate goes on from where it was."""
    before, total = 0, 0
    for count, step in plan:
        total += count * (step - before)
        before = step
    return total
