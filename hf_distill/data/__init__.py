"""Data: from sources to rows of tokens and batches."""

from .collator import Collator, documents_of
from .load import Examples, hold_out, load_documents
from .mix import mix, mix_scheduled, tag
from .packing import check_isolation, pack
from .prompts import prompt_rows
from .tokenize import causal_rows, example_rows, rows_of
from .training_templates import training_template

__all__ = [
    "Collator",
    "Examples",
    "causal_rows",
    "check_isolation",
    "documents_of",
    "example_rows",
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
