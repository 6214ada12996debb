"""Whether the files and folders that a recipe names on this machine exist. Imports no torch."""

from pathlib import Path

from ..core.references import DATASET_BUILDERS, is_file, path_exists, reference_kind
from ..errors import DistillError
from .downloads import named
from .schema import Recipe

_CONFIGS = ("config.json", "adapter_config.json")


def check_local(recipe: Recipe) -> None:
    """Refuse models and data that are named by a path where nothing is; ids and addresses are left to the Hub.

    Raises:
        DistillError: all of them at once.
    """
    problems = []
    for what, name, kind, _ in named(recipe):
        if not what.startswith("cache of") and reference_kind(name) == "path" and (why := _problem(name, kind)):
            problems.append(f"{what}: {why}")
    if problems:
        raise DistillError("; ".join(problems))


def _problem(name: str, kind: str) -> str | None:
    path = Path(name)
    if not path_exists(path):
        looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
        return f"there is no {'file' if path.suffix in DATASET_BUILDERS else 'file or folder'} {name!r}{looked}"
    if kind == "model" and not any(is_file(path / config) for config in _CONFIGS):
        return f"{name!r} is not the folder of a model: it has no config.json"
    return None
