"""After a run: what the teacher says, what the student has learnt of it, and what went wrong."""

from importlib import import_module

_HOME = {
    "Pair": "analysis.pair",
    "Run": "analysis.folder",
    "open_run": "analysis.folder",
    "plan": "planning.planner",
}

__all__ = ["Pair", "Run", "open_run", "plan"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.analysis' has no attribute {name!r}")
    return getattr(import_module(f"hf_distill.{_HOME[name]}"), name)
