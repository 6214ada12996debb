"""What the project asks of the Hub: files at a commit, errors in words, licences. Imports no torch."""

from .errors import asking
from .files import Fetched, address, beside, fetch, fetch_folder, pinned, written, yaml_files
from .malformed import line_of, reading
from .model_files import check_model, model_files

__all__ = [
    "Fetched",
    "address",
    "asking",
    "beside",
    "check_model",
    "fetch",
    "fetch_folder",
    "line_of",
    "model_files",
    "pinned",
    "reading",
    "written",
    "yaml_files",
]
