"""Recipes: YAML files that describe a distillation run. They are read and validated here without torch."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "Recipe": ".schema",
    "load_recipe": ".load",
    "list_recipes": ".resolve",
    "run_recipe": "..runner.run",
    "generate_data": "..runner.generate",
    "GeneratedData": "..runner.generate",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from ..runner.generate import GeneratedData as GeneratedData
    from ..runner.generate import generate_data as generate_data
    from ..runner.run import run_recipe as run_recipe
    from .load import load_recipe as load_recipe
    from .resolve import list_recipes as list_recipes
    from .schema import Recipe as Recipe
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_HOME[name], __name__), name)
