"""Access to the Hugging Face Hub: files at a commit, readable errors, licenses of models. Imports no torch."""

from .errors import translate_hub_errors
from .files import Fetched, fetch, fetch_folder, format_uri, parse_uri, pin, sibling_uri, yaml_files
from .malformed import line_of, reading
from .model_files import check_model, model_files

__all__ = [
    "Fetched",
    "check_model",
    "fetch",
    "fetch_folder",
    "format_uri",
    "line_of",
    "model_files",
    "parse_uri",
    "pin",
    "reading",
    "sibling_uri",
    "translate_hub_errors",
    "yaml_files",
]
