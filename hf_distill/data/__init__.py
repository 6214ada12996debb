"""Data: from documents to rows of tokens."""

from .text import causal_rows, hold_out, load_documents

__all__ = ["causal_rows", "hold_out", "load_documents"]
