"""Recipes: a whole distillation as a YAML file; read and checked here, without torch, and run by `running`."""

from importlib import import_module

_HOME = {
    "Recipe": ".schema",
    "load_recipe": ".load",
    "list_recipes": ".resolve",
    "run_recipe": "..runner.run",  # by the name that users know
}

__all__ = ["Recipe", "list_recipes", "load_recipe", "run_recipe"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.recipe' has no attribute {name!r}")
    return getattr(import_module(_HOME[name], __name__), name)
