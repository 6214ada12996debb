"""A report of a run as one HTML page, with samples of the text that its models generate."""

from importlib import import_module
from typing import TYPE_CHECKING

_HOME = {
    "report": "html",
    "write_samples": "samples",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from .html import report as report
    from .samples import write_samples as write_samples
else:

    def __getattr__(name: str) -> object:
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
