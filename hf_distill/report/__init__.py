"""A report of a run as one HTML page, with samples of the text that its models generate."""

from importlib import import_module

_HOME = {"report": "html", "write_samples": "samples"}

__all__ = ["report", "write_samples"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'hf_distill.report' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)
