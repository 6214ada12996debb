"""Which temperature and alpha serve a student: short runs of candidates, judged by what no candidate can change."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from ..errors import DistillError
from ..evidence import read_json, write_json
from ..recipe.arguments import arguments
from ..recipe.folder import newest_checkpoint
from ..recipe.loading import check_launch
from ..recipe.run import Loaded, measured
from ..recipe.schema import Recipe
from .halving import cost, rungs

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
ALPHAS = (0.5, 0.9)
FILE = "temperature.json"


@dataclass(frozen=True)
class Rung:
    """A candidate after some steps, on the held-out rows.

    nll: of the labels, nats/token
    kl:  KL(teacher || student) at T = 1, nats/token
    """

    step: int
    nll: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Candidate:
    """A temperature and an alpha, and how far they came."""

    temperature: float
    alpha: float
    rungs: list[Rung]

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"t{self.temperature:g}-a{self.alpha:g}"


@dataclass(frozen=True)
class Search:
    """A search that is over.

    candidates: the best first
    by:         what they were judged by: "nll" or "kl"
    steps:      that all of them took together; `runs`: the same in whole runs
    overrides:  of the recipe: the winner's values
    """

    folder: Path
    candidates: list[Candidate]
    by: str
    steps: int
    runs: float
    overrides: list[str]


def find_temperature(
    recipe: Recipe,
    temperatures: Sequence[float] | None = None,
    alphas: Sequence[float] | None = None,
    by: str = "nll",
    eta: int = 2,
    folder: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> Search:
    """Search temperature and alpha by successive halving; goes on with a search that was cut off.

    All candidates have the same seed, data order and schedule of the learning rate; each trains on from where its last
    rung left it. They are judged on the held-out rows by the labels' negative log-likelihood or by KL at T = 1: the
    objective itself changes with T, so its value tells nothing.

    Args:
        recipe: train.max_steps are those of the winner.
        temperatures: None: 1, 2, 4, 8; times `alphas`, the grid.
        alphas: None: 0.5, 0.9.
        by: "nll", or "kl" where the teacher is to be copied, right or wrong.
        eta: one of so many candidates goes on.
        folder: of the search; None: the recipe's train.output_dir with "-temperature".
        on_stage: told in a few words what begins.

    Raises:
        DistillError: a grid or recipe that cannot be searched, or a folder of another search.
    """
    grid = [Candidate(float(t), float(a), []) for t in temperatures or TEMPERATURES for a in alphas or ALPHAS]
    _check(recipe, grid, by)
    plan = rungs(len(grid), recipe.train.max_steps, eta)
    place = Path(folder or f"{recipe.train.output_dir}-temperature")
    asked = {"recipe": recipe.model_dump(exclude_none=True), "by": by, "eta": eta}
    found = _begun(place, asked, grid)
    loaded: Loaded | None = None
    left = found
    for count, step in plan:
        left = _best(left, by)[:count]
        _forget(place, found, left)
        for candidate in left:
            if candidate.rungs and candidate.rungs[-1].step >= step:
                continue
            if loaded is None:
                check_launch(recipe)
                loaded = Loaded(recipe, arguments(recipe), place, [], on_stage)
            on_stage(f"T = {candidate.temperature:g}, alpha = {candidate.alpha:g}: to step {step}")
            candidate.rungs.append(_train(loaded, candidate, step))
            write_json(place / FILE, asked | {"candidates": [asdict(c) for c in found]})
    _forget(place, found, [])
    steps = cost(plan)
    won = left[0]
    overrides = [f"distill.temperature={won.temperature:g}", f"distill.alpha={won.alpha:g}"]
    search = Search(place, _best(found, by), by, steps, steps / recipe.train.max_steps, overrides)
    write_json(place / FILE, asked | asdict(search) | {"folder": str(place)})
    return search


def hp_space(trial: Any) -> dict[str, float]:
    """For `Trainer.hyperparameter_search(backend="optuna")`: T from 1 to 8, evenly in its log; alpha from 0.1 to 1."""
    return {
        "temperature": trial.suggest_float("temperature", 1.0, 8.0, log=True),
        "alpha": trial.suggest_float("alpha", 0.1, 1.0),
    }


def compute_objective(metrics: dict[str, float]) -> float:
    """For `Trainer.hyperparameter_search`, to be minimised: the labels' held-out nats/token, which no T changes."""
    return log(metrics["eval_perplexity"])


class _StopAt(TrainerCallback):
    """Ends a training early, with a checkpoint from which it can go on."""

    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_save = control.should_training_stop = state.global_step >= self.step


def _train(loaded: Loaded, candidate: Candidate, step: int) -> Rung:
    """Train a candidate on to a step, and measure it."""
    home = loaded.folder / candidate.name
    trainer = loaded.trainer(
        candidate.name,
        temperature=candidate.temperature,
        alpha=candidate.alpha,
        output_dir=str(home),
        save_strategy="no",
        save_total_limit=1,
        eval_strategy="no",
    )
    trainer.add_callback(_StopAt(step))
    set_seed(loaded.args.seed)
    trainer.train(resume_from_checkpoint=newest_checkpoint(home))
    found = measured(trainer.evaluate())
    return Rung(step, log(found["perplexity"]), found["kl"], found["agreement"])


def _check(recipe: Recipe, grid: list[Candidate], by: str) -> None:
    problems = []
    if by not in ("nll", "kl"):
        problems.append(f"by is {by!r}; known: nll, kl")
    if any(c.temperature <= 0 or not 0 < c.alpha <= 1 for c in grid):
        given = ", ".join(f"T = {c.temperature:g} with alpha = {c.alpha:g}" for c in grid)
        problems.append(
            f"temperatures are above 0, alphas above 0 (which is no distillation) and at most 1; got {given}"
        )
    if len({c.name for c in grid}) < len(grid):
        problems.append("a temperature or an alpha is given twice")
    if not (recipe.train.max_steps or 0) > 0:
        problems.append("the recipe counts epochs: set train.max_steps, the steps of the winner")
    if recipe.on_policy or recipe.stages or not recipe.kinds <= {"frozen", "cached"}:
        problems.append("candidates share one teacher that does not move, frozen or cached, and rows that are there")
    if problems:
        raise DistillError(f"Nothing to search: {'; '.join(problems)}.")


def _begun(place: Path, asked: dict[str, Any], grid: list[Candidate]) -> list[Candidate]:
    """The candidates as a search before left them, or as they are given.

    Raises:
        DistillError: the folder is that of another search.
    """
    before = read_json(place / FILE)
    if not before:
        if place.is_dir() and any(place.iterdir()):
            raise DistillError(f"{place} holds files and no {FILE}: choose another folder with -o.")
        place.mkdir(parents=True, exist_ok=True)
        write_json(place / FILE, asked | {"candidates": [asdict(c) for c in grid]})
        return grid
    known = {(c["temperature"], c["alpha"]): c for c in before["candidates"]}
    differ = [key for key in asked if before[key] != asked[key]]
    if {*known} != {(c.temperature, c.alpha) for c in grid}:
        differ.append("the grid")
    if differ:
        raise DistillError(
            f"{place} holds another search: {', '.join(differ)} differ. Remove it, or choose another folder with -o."
        )
    for candidate in grid:
        candidate.rungs.extend(Rung(**rung) for rung in known[candidate.temperature, candidate.alpha]["rungs"])
    return grid


def _best(candidates: list[Candidate], by: str) -> list[Candidate]:
    """Those that came farthest first, of them the best first."""
    other = "kl" if by == "nll" else "nll"

    def order(c: Candidate) -> tuple[float, ...]:
        last = c.rungs[-1] if c.rungs else None
        return (0.0,) if last is None else (-last.step, getattr(last, by), getattr(last, other))

    return sorted(candidates, key=order)


def _forget(place: Path, candidates: list[Candidate], kept: list[Candidate]) -> None:
    for candidate in candidates:
        if candidate not in kept:
            shutil.rmtree(place / candidate.name, ignore_errors=True)
