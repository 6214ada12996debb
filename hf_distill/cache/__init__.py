"""Teacher caches for offline distillation: teacher signals of the training data, written once, verified, and read."""

from .api import write_cache
from .example_keys import Example, batch_examples
from .manifest import Manifest, read_manifest
from .reader import CacheReader, verify_cache

__all__ = [
    "CacheReader",
    "Example",
    "Manifest",
    "batch_examples",
    "open_cache",
    "read_manifest",
    "verify_cache",
    "write_cache",
]


def open_cache(path: str) -> CacheReader:
    """Open a teacher cache for reading.

    Args:
        path: a folder, or hf://datasets/org/name[@revision], which is downloaded.

    Returns:
        a reader of the cache.

    Raises:
        DistillError: the path is not a complete cache.
    """
    from .hub import resolve_cache_dir

    return CacheReader(resolve_cache_dir(path))
