"""Previews the training rows of a recipe: their content with targets and sources."""

from ..core.defaults import PREVIEWED_ROWS
from ..recipe.schema import Recipe
from .generated_sources import seed_of
from .tasks import task_of
from .tasks.previews import Preview


def preview_rows(recipe: Recipe, rows: int = PREVIEWED_ROWS) -> list[Preview]:
    """Return the documents of the first rows of a recipe, before the trainer shuffles them.

    No model is loaded. Of texts and conversations only the first 200 examples of each source are read.

    Args:
        recipe: The recipe.
        rows: Number of rows.

    Raises:
        DistillError: An input is invalid.
    """
    return task_of(recipe).preview(seed_of(recipe), rows)
