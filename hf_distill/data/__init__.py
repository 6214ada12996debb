"""Data: from sources to rows of tokens and batches."""

from .collate import Collator, documents_of
from .load import Examples, hold_out, load_documents
from .mix import mix, mix_scheduled, tag
from .packing import check_isolation, pack
from .prompts import prompt_rows
from .rows import causal_rows, example_rows, rows_of
from .training_templates import training_template
from .views import View, fill_token

__all__ = [
    "Collator",
    "Examples",
    "View",
    "causal_rows",
    "check_isolation",
    "documents_of",
    "example_rows",
    "fill_token",
    "hold_out",
    "load_documents",
    "mix",
    "mix_scheduled",
    "pack",
    "prompt_rows",
    "rows_of",
    "tag",
    "training_template",
]
