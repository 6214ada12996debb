"""Run a recipe, whatever it is of: one student, or a chain of them."""

from collections.abc import Callable, Sequence

from transformers import TrainerCallback
from transformers.utils import logging

from ..recipe.schema import Recipe
from ..trainer.signal_handling import GracefulShutdown
from .progressive import run_chain
from .single_run import RunResult, run_single

logger = logging.get_logger(__name__)


def run_recipe(
    recipe: Recipe,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[str], None] = logger.info,
) -> RunResult:
    """Run a recipe from loading to evidence.

    `train.push_to_hub` is for the program, or for `publishing.publish` afterwards: nothing is pushed here.

    Args:
        recipe: see `load_recipe`.
        resume: go on from the newest whole checkpoint of the recipe's run folder; start afresh if there is none.
        callbacks: for the trainers.
        on_stage: told in a few words what begins.

    Returns:
        the run's folder and metrics.

    Raises:
        DistillError: the folder holds another run, or an input is wrong.
        RunError: it cannot go on, though its input was right.
        Interrupted: SIGTERM or SIGINT came, and was heeded.
    """
    run, interrupts = run_chain if recipe.stages else run_single, GracefulShutdown(on_stage)
    with interrupts.installed():
        return run(recipe, resume, [*callbacks, interrupts], on_stage)
