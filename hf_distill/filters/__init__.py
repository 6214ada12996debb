"""Filters and selections for generated completions; importing them loads no torch and no optional package."""

from .apply import Filtered, SetAside, StepCount, apply_filters, check_filters
from .base import RowFilter, Selection
from .registry import FILTERS, SELECTIONS
from .rows import Row

__all__ = [
    "FILTERS",
    "SELECTIONS",
    "Filtered",
    "Row",
    "RowFilter",
    "Selection",
    "SetAside",
    "StepCount",
    "apply_filters",
    "check_filters",
]
