"""Records the commits and package versions of the models and data that a run has read."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import httpx2
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from ..core.references import distribution_of, reference_kind
from ..core.results import Provenance
from ..recipe.downloads import hub_repo_of, referenced_repos
from ..recipe.schema import Recipe


def provenance(recipe: Recipe) -> dict[str, Provenance]:
    """Return what a recipe has read, as purpose -> entry."""
    entries: dict[str, Provenance] = {}
    for used_for, name, kind, revision in referenced_repos(recipe):
        entries[used_for] = {"dataset": name} if kind == "dataset" else {"model": name}
        if reference_kind(name) == "package" and (installed := _version(name)):
            entries[used_for]["version"] = installed
        if hub_repo := hub_repo_of(name, kind, revision):
            file = {"model": "config.json", "tokenizer": "tokenizer_config.json"}.get(kind)
            commit = _commit(*hub_repo) if file is None else _read_commit(*hub_repo[1:], file)
            if commit is not None:
                entries[used_for]["revision"] = commit
    return entries


def _version(name: str) -> str | None:
    try:
        return version(distribution_of(name))
    except PackageNotFoundError:
        return None  # the text is part of Python


def _read_commit(repo: str, revision: str | None, name: str) -> str | None:
    """Return the commit of a model, from one of its files in the Hub cache."""
    file = try_to_load_from_cache(repo, name, revision=revision or constants.DEFAULT_REVISION)
    return Path(file).parent.name if isinstance(file, str) else None


def _commit(kind: str, repo: str, revision: str | None) -> str | None:
    try:
        return HfApi().repo_info(repo, repo_type=kind, revision=revision).sha
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx2.TransportError):
        return None
