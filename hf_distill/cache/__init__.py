"""Teachers on disk: what a teacher says of the training data, written once, verified, and read ever after."""

from .api import write_cache
from .example_keys import Example, examples_of
from .manifest import Manifest, read_manifest
from .reader import Store, check_all

__all__ = ["Example", "Manifest", "Store", "check_all", "examples_of", "open_cache", "read_manifest", "write_cache"]


def open_cache(path: str) -> Store:
    """A cache, ready to be read.

    Args:
        path: a folder, or hf://datasets/org/name[@revision], which is downloaded.

    Raises:
        DistillError: it is no whole cache.
    """
    from .hub import folder_of

    return Store(folder_of(path))
