"""The first phase of a run whose recipe has sources with `generate: true`: the teacher completes their prompts.

Each source becomes a data set in a folder of its own; see `Recipe.generated_folder`. A data set is continued if it is
unfinished, and used as it is if it is complete.
"""

import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from ..data.loss_weights import check_weight_column, weight_value
from ..errors import DistillError
from ..filters.selections import LOG_PROBABILITY
from ..filters.user_functions import FunctionFilter
from ..generation.dataset import COLUMNS, column_names
from ..generation.progress import GenerationProgress
from ..generation.prompts import SourceRow
from ..generation.store import read_facts
from ..recipe.generation import Generation
from ..recipe.schema import Recipe
from ..teachers.loading import env_world_size
from .complete_data import GeneratedData, complete_data, request_of
from .generate import generate_data, read_prompts_of
from .generated_sources import generation_rows, seed_of

logger = logging.get_logger(__name__)


def generate_sources(
    recipe: Recipe,
    on_stage: Callable[[str], None] = lambda text: None,
    on_progress: Callable[[GenerationProgress], None] = lambda progress: None,
) -> list[GeneratedData]:
    """Let the teacher complete the prompts of all sources with `generate: true`.

    Returns:
        The data sets that were written. Those that are complete already are not among them.

    Raises:
        DistillError: The data or a folder is not possible, a folder holds completions of another recipe, or data is
            missing in a launch of several processes.
        RunError: A server failed.
    """
    options, written = recipe.generate or Generation.model_validate({}), list[GeneratedData]()
    missing = dict[str, list[SourceRow]]()
    for name in recipe.data.generated:  # all prompts are checked before the first model is loaded
        select = partial(generation_rows, recipe, seed=seed_of(recipe))
        prompts = read_prompts_of(recipe, options, name, select=select)
        _check_references(recipe, name, prompts)
        _check_loss_weight(recipe, options, name, prompts)
        request = request_of(recipe, options, prompts)
        if complete_data(Path(recipe.generated_folder(name)), recipe, options, request) is None:
            missing[name] = prompts
    if missing and env_world_size() > 1:
        raise DistillError(
            f"The teacher has not completed the prompts of data.{', data.'.join(missing)} yet, and generates in one "
            "process: run `hf-distill generate RECIPE` with the same overrides first, then start this launch again."
        )
    for name, prompts in missing.items():
        folder = recipe.generated_folder(name)
        is_replaced = options.output_dir and read_facts(Path(folder))
        on_stage(f"data.{name}: the teacher completes {len(prompts):,} prompts in {folder}")
        written.append(generate_data(recipe, folder, True, on_stage, on_progress, prompts))
        if is_replaced:
            logger.warning(
                f"{folder} held a data set that was written from these completions with other settings, such as "
                "filters, and was replaced: reports and analyses of runs that trained on it read the new rows. To keep "
                "both, give another generate.output_dir."
            )
        gc.collect()  # the teacher, before the models of the training are loaded
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    return written


def _check_references(recipe: Recipe, name: str, prompts: Sequence[SourceRow]) -> None:
    """Check that the data has completions, if the run reads them.

    Raises:
        DistillError: A row has none.
    """
    readers = ["data.eval.holdout evaluates on"] if recipe.data.eval.holdout else []
    readers += ["control: sft_on_data trains on"] if recipe.control == "sft_on_data" else []
    lacking = next((row.prompt.row for row in prompts if row.reference is None), None)
    if readers and lacking is not None:
        raise DistillError(
            f"data.{name}, row {lacking} (counted from 0), has a prompt without a completion, and "
            f"{' and '.join(readers)} the completions of the data: set data.eval.path instead of holdout, use another "
            "control, or add completions."
        )


def _check_loss_weight(recipe: Recipe, options: Generation, name: str, prompts: Sequence[SourceRow]) -> None:
    """Check the column of `loss_weight` before the generation, as far as it is known then.

    The values of a column of the source are checked, unless a function of the user may remove rows by them.

    Raises:
        DistillError: The completions will not have the column, or a value cannot be the weight of a row.
    """
    if (by := recipe.data.sources[name].loss_weight) is None:
        return
    added = options.added_columns
    columns = column_names(prompts, options.reasoning, options.log_probs)
    check_weight_column(by.column, [*dict.fromkeys([*columns, *added])], f"data.{name}")
    if by.column == LOG_PROBABILITY and by.temperature is None:
        raise DistillError(
            f"data.{name}.loss_weight: the values of {LOG_PROBABILITY} are negative, and the factor of a loss is at "
            f"least 0. Set a temperature, such as loss_weight: {{column: {LOG_PROBABILITY}, temperature: 1.0}}."
        )
    if by.column in COLUMNS or by.column in added or any(isinstance(each, FunctionFilter) for each in options.filters):
        return
    for row in prompts:
        try:
            weight_value(row.columns.get(by.column), by.column, by.temperature is None)
        except DistillError as error:
            raise DistillError(f"data.{name}, row {row.prompt.row} (counted from 0), {error}") from None
