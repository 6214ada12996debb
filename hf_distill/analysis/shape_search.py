"""Search for the shape of a pruned student with a number of parameters: short runs of candidates."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from ..core import run_files
from ..core.defaults import SEARCH_CRITERION, SEARCH_ETA, SHAPE_SEARCH_STEPS
from ..core.io import write_json
from ..core.locks import lock_folder
from ..core.processes import run_on_main
from ..core.pruned_sizes import millions
from ..errors import DistillError
from ..planning.shapes import model_config
from ..recipe.from_teacher import FromTeacher
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation
from ..runner.single_run import RunContext
from ..runner.training_arguments import arguments
from .candidate_training import CandidateTraining, search_problems
from .search_state import SearchSettings, delete_checkpoints, load_or_create, save_search
from .shape_candidates import ShapeCandidate, shape_candidates
from .successive_halving import cost, ranked, rungs


@dataclass(frozen=True)
class ShapeSearchResult:
    """Result of a completed search.

    candidates:   the best first; the first rung of each is at step 0, before training
    by:           criterion: "nll" or "kl"
    steps:        that were trained, of all candidates together
    from_teacher: `student.from_teacher` with the sizes of the winner
    """

    folder: str
    candidates: list[ShapeCandidate]
    by: str
    steps: int
    from_teacher: FromTeacher


def find_shape(
    recipe: Recipe,
    folder: str,
    by: str = SEARCH_CRITERION,
    eta: int = SEARCH_ETA,
    steps: int = SHAPE_SEARCH_STEPS,
    on_stage: Callable[[str], None] = lambda text: None,
) -> ShapeSearchResult:
    """Search the shape of a pruned student by successive halving; an interrupted search continues.

    All candidates are evaluated before training and after a few steps; the better ones continue, until one is left.
    They have the same importance of units, seed, data order and learning rate schedule.

    Args:
        recipe: its `student.from_teacher` has target_parameters.
        folder: of the search.
        by: criterion on the held-out rows: "nll" of the labels, or "kl" to the teacher.
        eta: one of eta candidates continues.
        steps: that the winner would have trained at most; fewer than train.max_steps, whose schedule is used.
        on_stage: called with a short description of each stage as it begins.

    Returns:
        all candidates with their results, and the shape that was found.

    Raises:
        DistillError: the recipe cannot be searched, no shape fits, or the folder contains another search.

    Source: 1502.07943
    """
    _check(recipe, by, steps)
    cut = recipe.student.from_teacher
    assert cut is not None
    assert cut.parameter_budget is not None
    spec = recipe.primary_teacher
    teacher = model_config(spec.loaded_model or recipe.tokenizer_model, spec.revision)
    quantize = recipe.student.quantize
    divisor = quantize.resolved.required_divisor if quantize else 1
    grid = shape_candidates(teacher, cut.parameter_budget, divisor)
    # The last rung is left out: it has one candidate, the winner.
    plan = [(len(grid), 0), *rungs(len(grid), steps, eta, "--steps")[:-1]]
    search_folder, args = Path(folder), arguments(recipe)
    settings: SearchSettings = {"recipe": recipe.model_dump(exclude_none=True), "by": by, "eta": eta}
    file = run_files.SHAPE_SEARCH
    candidates = run_on_main(lambda: load_or_create(search_folder, settings, grid, file))

    def prepare(context: RunContext, candidate: ShapeCandidate) -> dict[str, object]:
        assert context.models.pruner is not None
        context.models.pruner.change_sizes(_with_sizes(cut, candidate))
        return {}

    with ExitStack() as stack:
        run_on_main(lambda: stack.enter_context(lock_folder(search_folder, "a search for a shape")))
        training = CandidateTraining(
            recipe,
            args,
            search_folder,
            by,
            on_stage,
            describe=lambda c: f"{c.name} ({millions(c.parameters)} parameters)",
            prepare=prepare,
            save=lambda: save_search(search_folder, settings, candidates, file),
        )
        winner = training.run(candidates, plan)
        result = ShapeSearchResult(folder, ranked(candidates, by), by, cost(plan), _with_sizes(cut, winner))
        run_on_main(partial(write_json, search_folder / file, {**settings, **as_json(result)}))
        run_on_main(partial(delete_checkpoints, search_folder, candidates, []))
    return result


def as_json(result: ShapeSearchResult) -> dict:
    """Return the values of a result for a JSON file."""
    return {**asdict(result), "from_teacher": result.from_teacher.model_dump(exclude_none=True)}


def _with_sizes(cut: FromTeacher, candidate: ShapeCandidate) -> FromTeacher:
    """Return the section `from_teacher` with the sizes of a candidate in place of the number of parameters."""
    options = {"by": cut.by} if set(candidate.sizes) - {"keep_layers"} else {}
    return FromTeacher.model_validate({**candidate.sizes, **options, "calibration_rows": cut.calibration_rows})


def _check(recipe: Recipe, by: str, steps: int) -> None:
    """Check that the shape of a recipe's student can be searched.

    Raises:
        DistillError: names every reason why it cannot.
    """
    require_text_generation(recipe, "The search of a shape")
    problems = search_problems(recipe, by)
    if recipe.student.from_teacher is None or recipe.student.from_teacher.target_parameters is None:
        problems.append("student.from_teacher has no target_parameters")
    if 0 < (recipe.train.max_steps or 0) < steps:
        problems.append(
            f"the search takes up to {steps} steps and train.max_steps is {recipe.train.max_steps}: lower --steps"
        )
    if problems:
        raise DistillError(f"The shape cannot be searched: {'; '.join(problems)}.")
