"""Imports published log-probabilities as a `top_k` teacher cache: the formats, their checks, and the import."""

from .importing import ImportSummary, import_cache, write_texts

__all__ = ["ImportSummary", "import_cache", "write_texts"]
