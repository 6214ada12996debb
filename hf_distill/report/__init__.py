"""A report of a run as one HTML page, with samples of the text that its models generate."""

from typing import TYPE_CHECKING

from ..lazy_imports import import_on_first_use

_HOME = {
    "report": ".html",
    "write_samples": ".samples",
}

__all__ = list(_HOME)

if TYPE_CHECKING:
    from .html import report as report
    from .samples import write_samples as write_samples
else:
    __getattr__ = import_on_first_use(__name__, _HOME)
