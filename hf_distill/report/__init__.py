"""A run as one HTML page, and samples of what its student writes."""

from importlib import import_module

_HOME = {"report": "html", "write_samples": "samples"}

__all__ = ["report", "write_samples"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.report' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
