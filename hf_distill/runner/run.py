"""Runs a recipe: a single student, or a chain of students."""

from collections.abc import Callable, Sequence
from functools import partial

from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import DistillError
from ..generation.progress import GenerationProgress
from ..recipe.schema import Recipe
from ..trainer.signal_handling import GracefulShutdown
from .generation_phase import generate_sources
from .progressive import run_chain
from .single_run import RunResult, run_single

logger = logging.get_logger(__name__)


def run_recipe(
    recipe: Recipe,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    on_stage: Callable[[str], None] = logger.info,
    on_generation: Callable[[GenerationProgress], None] = lambda progress: None,
) -> RunResult:
    """Run a recipe: train and evaluate the student and its control, and write the run folder.

    First the teacher completes the prompts of sources with `generate: true`.

    Nothing is pushed to the Hub. The command line handles `train.push_to_hub`; in a script, call
    `publishing.publish` afterwards.

    Args:
        recipe: The recipe; see `load_recipe`.
        resume: Resume from the newest complete checkpoint in the run folder, or start from the beginning if there is
            none.
        callbacks: Callbacks for the trainers.
        on_stage: Called with a short description of each stage when it begins.
        on_generation: Called at most twice a second while the teacher completes prompts.

    Returns:
        The run folder and the metrics.

    Raises:
        DistillError: The folder holds another run, or an input is invalid.
        RunError: The run cannot continue although its input is valid.
        RunInterrupted: SIGTERM or SIGINT stopped the run, and what it has saved is kept.
    """
    cut = recipe.student.from_teacher
    if cut is not None and cut.target_parameters is not None:
        raise DistillError(
            f"student.from_teacher.target_parameters is {cut.target_parameters}, so the sizes of the student are not "
            "known: `hf-distill prune RECIPE` compares shapes, and prints the sizes to set."
        )
    run, interrupts = run_chain if recipe.stages else run_single, GracefulShutdown(on_stage)
    with interrupts.installed():
        generate = partial(generate_sources, recipe, on_stage, on_generation)
        return run(recipe, resume, [*callbacks, interrupts], on_stage, generate)
