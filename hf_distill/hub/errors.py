"""What the Hub refuses, in words: what was asked, what there is, what to do."""

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
    """Turn what the Hub refuses within the block into words.

    Args:
        repo: org/name that is asked for.
        kind: "model" or "dataset".
        revision: that is asked for.
        file: that is asked for.

    Raises:
        DistillError: no token or one without access; no such repository, revision or file, with near names; gated;
            someone else wrote meanwhile; the Hub is out of reach or fails.
    """
    what = f"{NAMES[kind]} repository {repo!r}"
    try:
        yield
    except GatedRepoError:
        raise DistillError(
            f"The {what} is gated: accept its terms at {_page(repo, kind)} with the account of your token, then run "
            f"this again.{_login()}"
        ) from None
    except RepositoryNotFoundError:
        raise DistillError(
            f"There is no {what}, or it is private and {_who()} may not see it{_near_repos(repo, kind)}"
            f"{_other_kind(repo, kind)}{_login()}"
        ) from None
    except RevisionNotFoundError:
        raise DistillError(f"The {what} has no revision {revision!r}{_near_revisions(repo, kind, revision)}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionResolutionError) as error:
        if isinstance(status := error.__cause__, HfHubHTTPError) and status.response is not None:
            raise DistillError(_failed(what, status)) from error
        where = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
        raise DistillError(
            f"The Hub cannot be reached{where}, and {file or 'what is needed'} of the {what} is not in the cache. Run "
            "this once with a connection; afterwards it works without."
        ) from error
    except EntryNotFoundError:
        raise DistillError(f"The {what} has no file {file!r}{_near_files(repo, kind, revision, file)}") from None
    except HfHubHTTPError as error:
        raise DistillError(_failed(what, error)) from error
    except HFValidationError as error:
        raise DistillError(f"{repo!r} is no name of a repository, which is org/name: {error}") from None
    except httpx2.TransportError as error:
        raise DistillError(_cut_off(what, error)) from error
    except RuntimeError as error:  # of an upload, whose cause says why
        if isinstance(error.__cause__, HfHubHTTPError):
            raise DistillError(_failed(what, error.__cause__)) from error
        if isinstance(error.__cause__, httpx2.TransportError):
            raise DistillError(_cut_off(what, error.__cause__)) from error
        raise


def _failed(what: str, error: HfHubHTTPError) -> str:
    status = error.response.status_code if error.response is not None else 0
    message = (error.server_message or str(error)).strip()
    if status == 401:
        return f"The Hub does not take {_who()} for the {what}: {message}{_login()}"
    if status == 403:
        return f"{_who().capitalize()} may not do this with the {what}: {message} Give it write access there."
    if status in (409, 412):
        return f"Someone else wrote to the {what} meanwhile ({status}: {message}); run this again."
    return f"The Hub answered {status} for the {what}: {message} Run this again later."


def _cut_off(what: str, error: httpx2.TransportError) -> str:
    return f"The Hub cannot be reached for the {what}: {str(error) or type(error).__name__}. Run this again later."


def _who() -> str:
    return "your token" if get_token() else "a visitor without a token"


def _login() -> str:
    return "" if get_token() else " No token is set: run `hf auth login`, or set HF_TOKEN."


def _page(repo: str, kind: str) -> str:
    return f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repo}"


def _near_repos(repo: str, kind: str) -> str:
    author, api = repo.partition("/")[0], HfApi()
    listed = api.list_models if kind == "model" else api.list_datasets
    return _near(repo, lambda: [info.id for info in listed(author=author, limit=200)])


def _other_kind(repo: str, kind: str) -> str:
    """A hint where a data set was asked for as a model, or the other way round."""
    other = "dataset" if kind == "model" else "model"
    try:
        there = HfApi().repo_exists(repo, repo_type=other)
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled):
        return ""
    prefix = "datasets/" if other == "dataset" else ""
    return f" There is a {NAMES[other]} of that name: hf://{prefix}{repo}." if there else ""


def _near_revisions(repo: str, kind: str, revision: str | None) -> str:
    def names() -> list[str]:
        refs = HfApi().list_repo_refs(repo, repo_type=kind)
        return [ref.name for ref in [*refs.branches, *refs.tags]]

    return _near(str(revision), names)


def _near_files(repo: str, kind: str, revision: str | None, file: str | None) -> str:
    def names() -> list[str]:
        files = HfApi().list_repo_files(repo, repo_type=kind, revision=revision)
        return [name for name in files if str(file).rpartition(".")[2] == name.rpartition(".")[2]] or files

    return _near(str(file), names)


def _near(name: str, names: Callable[[], list[str]]) -> str:
    """Near names; a Hub that does not tell them is no second error."""
    try:
        return did_you_mean(name, names()) + "."
    except (HfHubHTTPError, httpx2.TransportError, OfflineModeIsEnabled):
        return "."
