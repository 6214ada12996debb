"""Errors of the Hub as readable messages: what was requested, what exists, what to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx2
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)

from ..errors import DistillError, did_you_mean

NAMES = {"model": "model", "dataset": "data set", "space": "space"}


@contextmanager
def translate_hub_errors(
    repo: str, kind: str = "model", revision: str | None = None, file: str | None = None
) -> Iterator[None]:
    """Turn the errors that the Hub raises within the block into `DistillError` with a readable message.

    Args:
        repo: the requested repository, org/name.
        kind: "model" or "dataset".
        revision: the requested revision.
        file: the requested file.

    Raises:
        DistillError: there is no token or it has no access; the repository, revision or file does not exist (the
            message lists similar names); the repository is gated; someone else wrote to it in the meantime; the Hub
            cannot be reached or fails.
    """
    what = f"{NAMES[kind]} repository {repo!r}"
    try:
        yield
    except GatedRepoError:
        raise DistillError(
            f"The {what} is gated: accept its terms at {_repo_url(repo, kind)} with the account of your token, then "
            f"run this again.{login_hint()}"
        ) from None
    except RepositoryNotFoundError:
        raise DistillError(
            f"There is no {what}, or it is private and {credentials()} has no access to it{_similar_repos(repo, kind)}"
            f"{_other_type_hint(repo, kind)}{login_hint()}"
        ) from None
    except RevisionNotFoundError:
        raise DistillError(
            f"The {what} has no revision {revision!r}{_similar_revisions(repo, kind, revision)}"
        ) from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        if isinstance(status := error.__cause__, HfHubHTTPError) and status.response is not None:
            raise DistillError(_status_message(what, status)) from error
        where = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DistillError(
            f"The Hub cannot be reached{where}, and {file or 'a required file'} of the {what} is not in the local "
            "cache. Run this once with a connection; afterwards it works without one."
        ) from error
    except EntryNotFoundError:
        raise DistillError(f"The {what} has no file {file!r}{_similar_files(repo, kind, revision, file)}") from None
    except HfHubHTTPError as error:
        raise DistillError(_status_message(what, error)) from error
    except HFValidationError as error:
        raise DistillError(f"{repo!r} is not a valid repository name; write org/name: {error}") from None
    except httpx2.TransportError as error:
        raise DistillError(_connection_message(what, error)) from error
    except RuntimeError as error:  # an upload raises this, and its cause is the error of the Hub
        if isinstance(error.__cause__, HfHubHTTPError):
            raise DistillError(_status_message(what, error.__cause__)) from error
        if isinstance(error.__cause__, httpx2.TransportError):
            raise DistillError(_connection_message(what, error.__cause__)) from error
        raise


def _status_message(what: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    message = (error.server_message or str(error)).strip()
    if status == 401:
        return f"The Hub does not accept {credentials()} for the {what}: {message}{login_hint()}"
    if status == 403:
        sender = credentials().capitalize()
        return f"{sender} is not allowed to do this with the {what}: {message} Give it write access there."
    if status in (409, 412):
        return f"Someone else wrote to the {what} meanwhile ({status}: {message}); run this again."
    return f"The Hub answered {status} for the {what}: {message} Run this again later."


def _connection_message(what: str, error: httpx2.TransportError) -> str:
    reason = str(error).rstrip(".") or type(error).__name__
    return f"The Hub cannot be reached for the {what}: {reason}. Run this again later."


def credentials() -> str:
    """Return with what requests are sent, as the subject of a sentence."""
    return "your token" if get_token() else "a request without a token"


def login_hint() -> str:
    """Return a sentence that says how to set a token; empty if there is one."""
    return "" if get_token() else " No token is set: run `hf auth login`, or set HF_TOKEN."


def _repo_url(repo: str, kind: str) -> str:
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repo}"


def _similar_repos(repo: str, kind: str) -> str:
    author, api = repo.partition("/")[0], HfApi()
    list_repos = api.list_models if kind == "model" else api.list_datasets
    return _did_you_mean(repo, lambda: [info.id for info in list_repos(author=author, limit=200)])


def _other_type_hint(repo: str, kind: str) -> str:
    """Return a hint if the repository exists as a data set where a model was requested, or the other way round."""
    other = "dataset" if kind == "model" else "model"
    try:
        exists = HfApi().repo_exists(repo, repo_type=other)
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled):
        return ""
    prefix = "datasets/" if other == "dataset" else ""
    return f" There is a {NAMES[other]} of that name: hf://{prefix}{repo}." if exists else ""


def _similar_revisions(repo: str, kind: str, revision: str | None) -> str:
    def names() -> list[str]:
        refs = HfApi().list_repo_refs(repo, repo_type=kind)
        return [ref.name for ref in [*refs.branches, *refs.tags]]

    return _did_you_mean(str(revision), names)


def _similar_files(repo: str, kind: str, revision: str | None, file: str | None) -> str:
    def names() -> list[str]:
        files = HfApi().list_repo_files(repo, repo_type=kind, revision=revision)
        return [name for name in files if str(file).rpartition(".")[2] == name.rpartition(".")[2]] or files

    return _did_you_mean(str(file), names)


def _did_you_mean(name: str, names: Callable[[], list[str]]) -> str:
    """Return a hint with similar names; a failure to list them raises no second error."""
    try:
        return did_you_mean(name, names()) + "."
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled):
        return "."
