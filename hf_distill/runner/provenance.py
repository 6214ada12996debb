"""Records the commits and package versions of the models and data that a run has read."""

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
    """Return what a recipe has read, as purpose -> entry.

    An entry has the key "model" or "dataset" with the name, and if it is known "revision", the commit on the Hub, or
    "version", that of the package.
    """
    entries: dict[str, dict[str, Any]] = {}
    for used_for, name, kind, revision in referenced_repos(recipe):
        known: dict[str, Any] = {kind: name}
        if reference_kind(name) == "package":
            known["version"] = _version(name)
        elif hub_repo := hub_repo_of(name, kind, revision):
            known["revision"] = _read_commit(*hub_repo[1:]) if kind == "model" else _commit(*hub_repo)
        entries[used_for] = {key: value for key, value in known.items() if value is not None}
    return entries


def _version(name: str) -> str | None:
    try:
        return version(distribution_of(name))
    except PackageNotFoundError:
        return None  # the text is part of Python


def _read_commit(repo: str, revision: str | None) -> str | None:
    """Return the commit of a model, from its config in the Hub cache."""
    file = try_to_load_from_cache(repo, "config.json", revision=revision or constants.DEFAULT_REVISION)
    return Path(file).parent.name if isinstance(file, str) else None


def _commit(kind: str, repo: str, revision: str | None) -> str | None:
    try:
        return HfApi().repo_info(repo, repo_type=kind, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError):
        return None
