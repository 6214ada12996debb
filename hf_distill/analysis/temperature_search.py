"""Search for temperature and alpha: short runs of candidates, judged by metrics that do not depend on the objective."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, log
from pathlib import Path
from typing import TYPE_CHECKING

from ..core import run_files
from ..core.defaults import SEARCH_CRITERION, SEARCH_ETA
from ..core.io import write_json
from ..core.locks import lock_folder
from ..core.processes import run_on_main
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from ..runner.training_arguments import arguments
from .candidate_training import CandidateTraining, search_problems
from .search_state import SearchSettings, delete_checkpoints, load_or_create, save_search
from .successive_halving import Candidate, cost, pareto_front, ranked, rungs

if TYPE_CHECKING:
    from optuna import Trial

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
ALPHAS = (0.5, 0.9)


@dataclass(frozen=True)
class SearchResult:
    """Result of a completed search.

    candidates:   the best first
    pareto_front: names of the candidates that no other one beats in both NLL and KL; see `pareto_front`
    by:           criterion: "nll" or "kl"
    steps:        of all candidates together; `runs`: the same in full runs
    overrides:    the winner's values as overrides of the recipe
    """

    folder: str
    candidates: list[Candidate]
    pareto_front: list[str]
    by: str
    steps: int
    runs: float
    overrides: list[str]


def find_temperature(
    recipe: Recipe,
    temperatures: Sequence[float] | None = None,
    alphas: Sequence[float] | None = None,
    by: str = SEARCH_CRITERION,
    eta: int = SEARCH_ETA,
    folder: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """Search temperature and alpha by successive halving; an interrupted search continues.

    All candidates have the same seed, data order and learning rate schedule, and each continues from its last rung. The
    criterion is the NLL of the labels or the KL at T = 1 on the held-out rows. The loss itself is no criterion, because
    its scale changes with T.

    Args:
        recipe: its train.max_steps are the winner's; its temperature and alpha are always a candidate.
        temperatures: None: 1, 2, 4, 8; the grid is each of them with each of `alphas`.
        alphas: None: 0.5, 0.9.
        by: "nll", or "kl" if the student should copy the teacher even where it is wrong.
        eta: one of eta candidates continues.
        folder: of the search; None: the recipe's train.output_dir with "-temperature" appended.
        on_stage: called with a short description of each stage as it begins.

    Returns:
        all candidates with their results, and the best one.

    Raises:
        DistillError: the grid or recipe cannot be searched, or the folder contains another search.

    Source: 1502.07943
    """
    _check(recipe, by)
    grid = _grid(recipe, temperatures, alphas)
    plan = rungs(len(grid), recipe.train.max_steps, eta)
    args = arguments(recipe)
    search_folder = Path(folder or f"{recipe.train.output_dir}-temperature")
    settings: SearchSettings = {"recipe": recipe.model_dump(exclude_none=True), "by": by, "eta": eta}
    candidates = run_on_main(lambda: load_or_create(search_folder, settings, grid))
    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_folder(search_folder, "a search for a temperature")))
        training = CandidateTraining[Candidate](
            recipe,
            args,
            search_folder,
            by,
            on_stage,
            describe=lambda c: f"T = {c.temperature:g}, alpha = {c.alpha:g}",
            prepare=lambda context, c: {"temperature": c.temperature, "alpha": c.alpha},
            save=lambda: save_search(search_folder, settings, candidates),
        )
        winner = training.run(candidates, plan)
        result = _result(candidates, plan, winner, recipe, search_folder, by)
        run_on_main(partial(write_json, search_folder / run_files.TEMPERATURE_SEARCH, {**settings, **asdict(result)}))
        run_on_main(partial(delete_checkpoints, search_folder, candidates, []))
    return result


def _result(
    candidates: list[Candidate], plan: list[tuple[int, int]], winner: Candidate, recipe: Recipe, folder: Path, by: str
) -> SearchResult:
    steps, candidates = cost(plan), ranked(candidates, by)
    return SearchResult(
        folder=str(folder),
        candidates=candidates,
        pareto_front=[candidate.name for candidate in pareto_front(candidates)],
        by=by,
        steps=steps,
        runs=steps / recipe.train.max_steps,
        overrides=[f"distill.temperature={winner.temperature}", f"distill.alpha={winner.alpha}"],
    )


def hp_space(trial: "Trial") -> dict[str, float]:
    """Search space for `Trainer.hyperparameter_search(backend="optuna")`: T from 1 to 8 (log scale), alpha 0.1 to 1."""
    return {
        "temperature": trial.suggest_float("temperature", 1.0, 8.0, log=True),
        "alpha": trial.suggest_float("alpha", 0.1, 1.0),
    }


def compute_objective(metrics: dict[str, float]) -> float:
    """Objective for `Trainer.hyperparameter_search`, to be minimized: held-out NLL in nats/token, independent of T."""
    return log(metrics["eval_perplexity"])


def _check(recipe: Recipe, by: str) -> None:
    """Check that a recipe can be searched.

    Raises:
        DistillError: names every reason why it cannot.
    """
    require_text_generation(recipe, "The search of temperature and alpha")
    if problems := search_problems(recipe, by):
        raise DistillError(f"Temperature and alpha cannot be searched: {'; '.join(problems)}.")


def _grid(recipe: Recipe, temperatures: Sequence[float] | None, alphas: Sequence[float] | None) -> list[Candidate]:
    """Return each temperature with each alpha, and the recipe's values.

    Raises:
        DistillError: the grid is empty, a value is out of range, or a pair is given twice.
    """
    grid_temperatures = TEMPERATURES if temperatures is None else [float(t) for t in temperatures]
    grid_alphas = ALPHAS if alphas is None else [float(a) for a in alphas]
    pairs = [(t, a) for t in grid_temperatures for a in grid_alphas]
    if not pairs or not all(isfinite(t) and t > 0 and 0 < a <= 1 for t, a in pairs):
        raise DistillError(
            "A grid needs one or more temperatures above 0, and one or more alphas above 0 (alpha 0 would be the "
            f"control, which `control: sft` trains) and at most 1; got temperatures {[*grid_temperatures]} and alphas "
            f"{[*grid_alphas]}."
        )
    recipe_pair = (recipe.distill.temperature, recipe.distill.alpha)
    if recipe_pair not in pairs and recipe_pair[1] > 0:
        pairs.append(recipe_pair)
    candidates = [Candidate(t, a, (t, a) == recipe_pair, []) for t, a in pairs]
    if len({candidate.name for candidate in candidates}) < len(candidates):
        raise DistillError(
            f"A pair of temperature and alpha is given twice: temperatures {[*grid_temperatures]}, alphas "
            f"{[*grid_alphas]}, the recipe's pair {recipe_pair}. Give each value once."
        )
    return candidates
