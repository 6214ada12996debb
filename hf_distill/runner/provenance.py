"""Which models and data a recipe's run really read: commits, versions of packages."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..core.references import distribution_of, reference_kind
from ..recipe.downloads import hub_repo_of, referenced_repos
from ..recipe.schema import Recipe


def provenance(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Of all that a recipe names: what for -> its name, and its commit or version where one can be told.

    "model" or "dataset": the name; "revision": the commit on the Hub; "version": of the package that brings it.
    """
    found: dict[str, dict[str, Any]] = {}
    for what, name, kind, asked in referenced_repos(recipe):
        known: dict[str, Any] = {kind: name}
        if reference_kind(name) == "package":
            known["version"] = _version(name)
        elif place := hub_repo_of(name, kind, asked):
            known["revision"] = _read_commit(*place[1:]) if kind == "model" else _commit(*place)
        found[what] = {key: value for key, value in known.items() if value is not None}
    return found


def _version(name: str) -> str | None:
    try:
        return version(distribution_of(name))
    except PackageNotFoundError:
        return None  # a text of Python's own


def _read_commit(repo: str, revision: str | None) -> str | None:
    """The commit of a model's config in the cache, which has just been read."""
    file = try_to_load_from_cache(repo, "config.json", revision=revision or constants.DEFAULT_REVISION)
    return Path(file).parent.name if isinstance(file, str) else None


def _commit(kind: str, repo: str, revision: str | None) -> str | None:
    try:
        return HfApi().repo_info(repo, repo_type=kind, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError):
        return None
