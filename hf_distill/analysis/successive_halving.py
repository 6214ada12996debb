"""Successive halving (1502.07943): all candidates train briefly, the better ones continue, one trains to the end."""

from dataclasses import dataclass
from math import inf, isnan, log
from typing import Protocol, TypeVar

from ..errors import DistillError


@dataclass(frozen=True)
class Rung:
    """A candidate's metrics on the held-out rows after some steps.

    nll:       of the labels, nats/token
    kl:        KL(teacher || student) at T = 1, nats/token; None for a cache without full distributions
    agreement: top-1 agreement, in [0, 1]; None if `kl` is
    """

    step: int
    nll: float
    kl: float | None
    agreement: float | None

    def value(self, by: str) -> float:
        """Return "nll" or "kl"; infinite if training diverged, so that the candidate ranks last."""
        metric = self.nll if by == "nll" else self.kl
        return inf if metric is None or isnan(metric) else metric


class Searched(Protocol):
    """A candidate of a search: a dataclass of values, with its rungs so far."""

    @property
    def name(self) -> str:
        """Name of the candidate's folder."""

    @property
    def rungs(self) -> list[Rung]:
        """Its metrics so far, which are appended to."""


C = TypeVar("C", bound=Searched)


@dataclass(frozen=True)
class Candidate:
    """A temperature and an alpha, with their rungs so far; `from_recipe`: both are the recipe's values."""

    temperature: float
    alpha: float
    from_recipe: bool
    rungs: list[Rung]

    @property
    def name(self) -> str:
        """Name of the candidate's folder."""
        return f"t{self.temperature:g}-a{self.alpha:g}"


def rungs(candidates: int, steps: int, eta: int = 2, setting: str = "train.max_steps") -> list[tuple[int, int]]:
    """Return (number of candidates, step up to which they train) of each rung; no step is trained twice.

    The last rung has one candidate and all steps; each earlier rung has eta times as many candidates and eta times
    fewer steps. Example: 8 candidates with eta 2 train as 8 to 1/8, 4 to 1/4, 2 to 1/2 and 1 to the end of the steps.
    This costs as many steps as 2.5 full runs. If the number of candidates is not a power of eta, the first rung has a
    few more or fewer.

    Args:
        candidates: number of candidates.
        steps: of a full run.
        eta: one of eta candidates continues.
        setting: what sets the steps, for the error.

    Raises:
        DistillError: there is no candidate, eta is below 2, or the first rung would have less than 2 steps.
    """
    if candidates < 1 or eta < 2:
        raise DistillError(
            f"There are {candidates} candidates and eta is {eta}: give at least 1 candidate, and an eta of at least 2."
        )
    count = max(round(log(candidates, eta)), int(candidates > 1))
    if steps < 2 * eta**count:
        raise DistillError(
            f"{steps} steps are too few for {candidates} candidates: the first of {count + 1} rungs would have "
            f"{steps / eta**count:.1f}. Set {setting} to {2 * eta**count} or more."
        )
    sizes = [candidates, *(eta**i for i in reversed(range(count)))]
    return [(size, round(steps / eta ** (count - i))) for i, size in enumerate(sizes)]


def cost(plan: list[tuple[int, int]]) -> int:
    """Return the steps of a full search, in which each candidate continues from its last rung."""
    previous_step, total = 0, 0
    for count, step in plan:
        total += count * (step - previous_step)
        previous_step = step
    return total


def ranked(candidates: list[C], by: str) -> list[C]:
    """Sort candidates by the steps they trained, then by the criterion; ties by the other metric, then by the grid.

    Args:
        candidates: in the order of the grid.
        by: "nll" or "kl".
    """
    other = "kl" if by == "nll" else "nll"

    def order(candidate: C) -> tuple[float, ...]:
        if not candidate.rungs:
            return (0.0,)
        last = candidate.rungs[-1]
        return (-last.step, last.value(by), last.value(other))

    return sorted(candidates, key=order)


def pareto_front(candidates: list[C]) -> list[C]:
    """Return the candidates that no other one beats in both NLL and KL at the step where they stopped.

    There is more than the winner if the metrics disagree: a stopped candidate may lead in the metric that is not the
    criterion.
    """

    def is_dominated(candidate: C) -> bool:
        last = candidate.rungs[-1]
        metrics = (last.value("nll"), last.value("kl"))
        rivals = [
            (rung.value("nll"), rung.value("kl"))
            for other in candidates
            for rung in other.rungs
            if rung.step == last.step
        ]
        return any(r != metrics and r[0] <= metrics[0] and r[1] <= metrics[1] for r in rivals)

    return [candidate for candidate in candidates if not is_dominated(candidate)]
