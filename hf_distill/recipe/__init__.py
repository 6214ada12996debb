"""Recipes: YAML files that describe a distillation run. They are read and validated here without torch."""

from importlib import import_module

_HOME = {
    "Recipe": ".schema",
    "load_recipe": ".load",
    "list_recipes": ".resolve",
    "run_recipe": "..runner.run",  # re-exported for users, imported on first use
}

__all__ = ["Recipe", "list_recipes", "load_recipe", "run_recipe"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.recipe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
