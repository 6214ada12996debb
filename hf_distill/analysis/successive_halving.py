"""Successive halving (1502.07943): all candidates train a little, the better ones go on, one trains to the end."""

from dataclasses import dataclass
from math import inf, isnan, log

from ..errors import DistillError


@dataclass(frozen=True)
class Rung:
    """A candidate after some steps, on the held-out rows.

    nll:       of the labels, nats/token
    kl:        KL(teacher || student) at T = 1, nats/token; None: of a cache that does not hold whole distributions
    agreement: how often both models' likeliest id is the same, in [0, 1]; None with `kl`
    """

    step: int
    nll: float
    kl: float | None
    agreement: float | None

    def value(self, by: str) -> float:
        """Of "nll" or "kl"; infinite where training diverged, so that it loses."""
        found = self.nll if by == "nll" else self.kl
        return inf if found is None or isnan(found) else found


@dataclass(frozen=True)
class Candidate:
    """A temperature and an alpha, and how far they came; `from_recipe`: they are the recipe's."""

    temperature: float
    alpha: float
    from_recipe: bool
    rungs: list[Rung]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"t{self.temperature:g}-a{self.alpha:g}"


def rungs(candidates: int, steps: int, eta: int = 2) -> list[tuple[int, int]]:
    """(candidates that train, step up to which) of each rung; what was trained before is not trained again.

    The last rung has one candidate and all steps; each one before it eta times as many, and eta times fewer. Of 8
    candidates at eta 2: 8 to 1/8, 4 to 1/4, 2 to 1/2, 1 to the end: as many steps as 2.5 whole runs. Where the number
    of candidates is no power of eta, the first rung has a few more or less.

    Args:
        candidates: how many there are.
        steps: of a whole run.
        eta: one of so many goes on.

    Raises:
        DistillError: no candidate, an eta below 2, or too few steps for the first rung.
    """
    if candidates < 1 or eta < 2:
        raise DistillError(f"There are {candidates} candidates and eta is {eta}: at least 1, and at least 2.")
    count = max(round(log(candidates, eta)), int(candidates > 1))
    if steps < 2 * eta**count:
        raise DistillError(
            f"{steps} steps are too few for {candidates} candidates: the first of {count + 1} rungs would have "
            f"{steps / eta**count:.1f}. Set train.max_steps to {2 * eta**count} or more, or give fewer candidates."
        )
    kept = [candidates, *(eta**i for i in reversed(range(count)))]
    return [(number, round(steps / eta ** (count - i))) for i, number in enumerate(kept)]


def cost(plan: list[tuple[int, int]]) -> int:
    """Steps of a whole search: each candidate goes on from where it was."""
    before, total = 0, 0
    for count, step in plan:
        total += count * (step - before)
        before = step
    return total


def ranked(candidates: list[Candidate], by: str) -> list[Candidate]:
    """Those that came farthest first, of them the best first; ties fall to the other measure, then to the grid.

    Args:
        candidates: in the order of the grid.
        by: "nll" or "kl".
    """
    other = "kl" if by == "nll" else "nll"

    def order(candidate: Candidate) -> tuple[float, ...]:
        if not candidate.rungs:
            return (0.0,)
        last = candidate.rungs[-1]
        return (-last.step, last.value(by), last.value(other))

    return sorted(candidates, key=order)


def pareto_front(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beat in both NLL and KL at the step where they stopped (the Pareto front).

    More than the winner where the two disagree: one that was dropped may lead in the measure that did not decide.
    """

    def beaten(candidate: Candidate) -> bool:
        last = candidate.rungs[-1]
        own = (last.value("nll"), last.value("kl"))
        met = [rung for other in candidates for rung in other.rungs if rung.step == last.step]
        rivals = [(rung.value("nll"), rung.value("kl")) for rung in met]
        return any(r != own and r[0] <= own[0] and r[1] <= own[1] for r in rivals)

    return [candidate for candidate in candidates if not beaten(candidate)]
