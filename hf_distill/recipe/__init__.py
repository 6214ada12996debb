"""Recipes: YAML files that describe a distillation run. They are read and validated here without torch."""

from typing import TYPE_CHECKING

from ..lazy_imports import import_on_first_use

_HOME = {
    "Recipe": ".schema",
    "load_recipe": ".load",
    "list_recipes": ".resolve",
    "run_recipe": "..runner.run",
    "resolve_model": "..runner.model_loading",
    "generate_data": "..runner.generate",
    "GeneratedData": "..runner.complete_data",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from ..runner.complete_data import GeneratedData as GeneratedData
    from ..runner.generate import generate_data as generate_data
    from ..runner.model_loading import resolve_model as resolve_model
    from ..runner.run import run_recipe as run_recipe
    from .load import load_recipe as load_recipe
    from .resolve import list_recipes as list_recipes
    from .schema import Recipe as Recipe
else:
    __getattr__ = import_on_first_use(__name__, _HOME)
