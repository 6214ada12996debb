"""What the project asks of the Hub: files at a commit, errors in words, licences. Imports no torch."""

from .files import Fetched, address, beside, fetch, fetch_folder, pinned, written, yaml_files
from .told import asking

__all__ = ["Fetched", "address", "asking", "beside", "fetch", "fetch_folder", "pinned", "written", "yaml_files"]
