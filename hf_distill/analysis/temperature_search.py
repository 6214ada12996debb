"""Which temperature and alpha serve a student: short runs of candidates, judged by what no candidate can change."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from math import isfinite, log
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from ..core.io import write_json
from ..core.locks import lock_folder
from ..core.processes import run_on_main
from ..errors import DistillError
from ..recipe.schema import Recipe
from ..runner.cache_writer import write_smoke_cache
from ..runner.model_factory import check_launch
from ..runner.single_run import RunContext, held_out_metrics
from ..runner.training_arguments import arguments
from .search_state import FILE, delete_checkpoints, load_or_create, save_search
from .successive_halving import Candidate, Rung, cost, pareto_front, ranked, rungs

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
ALPHAS = (0.5, 0.9)
_KINDS = {"frozen", "cached", "adapter_base"}  # of teachers that one candidate leaves to the next as it found them


@dataclass(frozen=True)
class SearchResult:
    """A search that is over.

    candidates: the best first
    pareto_front:      names of those that no other beat in both NLL and KL; see `halving.front`
    by:         what they were judged by: "nll" or "kl"
    steps:      that all of them took together; `runs`: the same in whole runs
    overrides:  of the recipe: the winner's values
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
    by: str = "nll",
    eta: int = 2,
    folder: str | None = None,
    on_stage: Callable[[str], None] = lambda text: None,
) -> SearchResult:
    """Search temperature and alpha by successive halving; goes on with a search that was cut off.

    All candidates have the same seed, data order and schedule of the learning rate; each trains on from where its last
    rung left it. They are judged on the held-out rows by the labels' negative log-likelihood or by KL at T = 1: the
    objective itself changes with T, so its value tells nothing.

    Args:
        recipe: train.max_steps are those of the winner; its own temperature and alpha are always a candidate.
        temperatures: None: 1, 2, 4, 8; times `alphas`, the grid.
        alphas: None: 0.5, 0.9.
        by: "nll", or "kl" where the teacher is to be copied, right or wrong.
        eta: one of so many candidates goes on.
        folder: of the search; None: the recipe's train.output_dir with "-temperature".
        on_stage: told in a few words what begins.

    Raises:
        DistillError: a grid or recipe that cannot be searched, or a folder of another search.

    Source: 1502.07943
    """
    _check(recipe, by)
    grid = _grid(recipe, temperatures, alphas)
    plan = rungs(len(grid), recipe.train.max_steps, eta)
    args = arguments(recipe)
    place = Path(folder or f"{recipe.train.output_dir}-temperature")
    asked = {"recipe": recipe.model_dump(exclude_none=True), "by": by, "eta": eta}
    found = run_on_main(lambda: load_or_create(place, asked, grid))
    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_folder(place, "a search for a temperature")))
        won = _winner(found, plan, asked, recipe, args, place, on_stage)
        search = _result(found, plan, won, recipe, place, by)
        run_on_main(partial(write_json, place / FILE, asked | asdict(search)))
        run_on_main(partial(delete_checkpoints, place, found, []))
    return search


def _winner(
    found: list[Candidate],
    plan: list[tuple[int, int]],
    asked: dict[str, Any],
    recipe: Recipe,
    args: Any,
    place: Path,
    on_stage: Callable[[str], None],
) -> Candidate:
    """Train the candidates rung by rung; the one that is left."""
    loaded: RunContext | None = None
    left, by = found, asked["by"]
    for count, step in plan:
        left = ranked(left, by)[:count]
        run_on_main(partial(delete_checkpoints, place, found, left))
        for candidate in left:
            if candidate.rungs and candidate.rungs[-1].step >= step:
                continue
            loaded = loaded or _loaded(recipe, args, place, by, on_stage)
            on_stage(f"T = {candidate.temperature:g}, alpha = {candidate.alpha:g}: to step {step}")
            candidate.rungs.append(_train(loaded, candidate, step))
            run_on_main(partial(save_search, place, asked, found))
    return left[0]


def _result(
    found: list[Candidate], plan: list[tuple[int, int]], won: Candidate, recipe: Recipe, place: Path, by: str
) -> SearchResult:
    """What a search found."""
    steps, found = cost(plan), ranked(found, by)
    return SearchResult(
        folder=str(place),
        candidates=found,
        pareto_front=[candidate.name for candidate in pareto_front(found)],
        by=by,
        steps=steps,
        runs=steps / recipe.train.max_steps,
        overrides=[f"distill.temperature={won.temperature}", f"distill.alpha={won.alpha}"],
    )


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
        if state.global_step >= self.step:
            control.should_training_stop = True
            control.should_save = state.global_step < state.max_steps


def _loaded(recipe: Recipe, args: Any, place: Path, by: str, on_stage: Callable[[str], None]) -> RunContext:
    """Models and data, once for all candidates.

    Raises:
        DistillError: the search is judged by KL, and a cache does not tell it.
    """
    check_launch(recipe)
    write_smoke_cache(recipe, on_stage)
    loaded = RunContext(recipe, args, place, [], on_stage)
    sparse = [path for path, facts in loaded.models.caches.items() if facts["kind"] != "hidden"]
    if by == "kl" and sparse:
        raise DistillError(f"{sparse[0]} holds no whole distributions, so there is no KL to judge by: judge by nll.")
    return loaded


def _train(loaded: RunContext, candidate: Candidate, step: int) -> Rung:
    """Train a candidate on from its last rung to a step, and measure it.

    Its newest checkpoint may be of a rung that a crash kept out of the record: that one is trained again.
    """
    home = loaded.folder / candidate.name
    trainer = loaded.trainer(
        candidate.name,
        temperature=candidate.temperature,
        alpha=candidate.alpha,
        output_dir=str(home),
        save_strategy="no",
        save_total_limit=None,
        save_only_model=False,
        load_best_model_at_end=False,
        eval_strategy="no",
        push_to_hub=False,
    )
    trainer.add_callback(_StopAt(step))
    start = home / f"checkpoint-{candidate.rungs[-1].step}" if candidate.rungs else None
    set_seed(loaded.args.seed)
    trainer.train(resume_from_checkpoint=None if start is None else str(start))
    found = held_out_metrics(trainer.evaluate())
    return Rung(step, log(found["perplexity"]), found.get("kl"), found.get("agreement"))


def _check(recipe: Recipe, by: str) -> None:
    problems = []
    if by not in ("nll", "kl"):
        problems.append(f"by is {by!r}; known: nll, kl")
    if not (recipe.train.max_steps or 0) > 0:
        problems.append("the recipe counts epochs: set train.max_steps, the steps of the winner")
    if recipe.on_policy:
        problems.append("the recipe is on-policy, and its candidates would learn from other texts each")
    if recipe.stages:
        problems.append("the recipe is a chain: search for one of its stages, in a recipe of its own")
    if not recipe.kinds <= _KINDS:
        problems.append(
            f"a teacher of kind {', '.join(sorted(recipe.kinds - _KINDS))} has no soft labels that stay the same from "
            f"candidate to candidate; those of {', '.join(sorted(_KINDS))} do"
        )
    if problems:
        raise DistillError(f"Nothing to search: {'; '.join(problems)}.")


def _grid(recipe: Recipe, temperatures: Sequence[float] | None, alphas: Sequence[float] | None) -> list[Candidate]:
    """Each temperature with each alpha, and the recipe's own values.

    Raises:
        DistillError: nothing was given, or a value twice, or one out of range.
    """
    given_t = TEMPERATURES if temperatures is None else [float(t) for t in temperatures]
    given_a = ALPHAS if alphas is None else [float(a) for a in alphas]
    pairs = [(t, a) for t in given_t for a in given_a]
    if not pairs or not all(isfinite(t) and t > 0 and 0 < a <= 1 for t, a in pairs):
        raise DistillError(
            "A grid is one or more temperatures above 0, and one or more alphas above 0 (that would be the control, "
            f"which control: sft trains) and at most 1; got temperatures {[*given_t]} and alphas {[*given_a]}."
        )
    own = (recipe.distill.temperature, recipe.distill.alpha)
    if own not in pairs and own[1] > 0:
        pairs.append(own)
    found = [Candidate(t, a, (t, a) == own, []) for t, a in pairs]
    if len({candidate.name for candidate in found}) < len(found):
        raise DistillError(
            f"A pair is given twice: temperatures {[*given_t]}, alphas {[*given_a]}, the recipe's {own}."
        )
    return found
