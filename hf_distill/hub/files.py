"""Files of Hub repositories, named by URIs such as hf://org/name@revision/file or hf://datasets/org/name/file."""

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import DryRunError, HfUriError, LocalEntryNotFoundError
from huggingface_hub.utils import HfUri, parse_hf_uri

from ..core.references import HUB_PREFIX
from ..errors import DistillError
from .errors import translate_hub_errors


@dataclass(frozen=True)
class Fetched:
    """A downloaded file.

    path: its path in the local Hub cache, in whose folder lie the other downloaded files of the same commit
    uri:  its URI, with the commit as the revision
    """

    path: Path
    uri: HfUri


_URI_FORMS = "hf://org/name[@revision]/file, or hf://datasets/org/name[@revision]/file"


def parse_uri(text: str) -> HfUri:
    """Parse the URI of a model or data set repository, or of a file or folder in one.

    Raises:
        DistillError: the text is not such a URI; the message shows the valid forms.
    """
    try:
        uri = parse_hf_uri(text)
    except HfUriError as error:
        raise DistillError(f"{text!r} is not a valid Hub URI: {error.msg} Write {_URI_FORMS}.") from None
    if uri.type not in ("model", "dataset"):
        raise DistillError(f"{text!r} is a {uri.type}, not a model or data set repository. Write {_URI_FORMS}.")
    if ".." in uri.path_in_repo.split("/"):
        raise DistillError(f"{text!r} leads out of its repository: remove the '..' from it.")
    return uri


def format_uri(uri: HfUri) -> str:
    """Return a URI as users write it: without `models/`."""
    return uri.to_uri().replace(f"{HUB_PREFIX}models/", HUB_PREFIX)


def pin(uri: HfUri, commit: str) -> HfUri:
    """Return the same URI with a commit as its revision."""
    return replace(uri, revision=commit)


def sibling_uri(uri: HfUri, name: str) -> HfUri:
    """Resolve a relative path in a file of a repository to a URI in the same repository and revision.

    Args:
        uri: the URI of the file that contains the relative path.
        name: the relative path.

    Raises:
        DistillError: the path leads out of the repository.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(uri.path_in_repo), name))
    if name.startswith(("/", "~")) or "\\" in name or path.split("/")[0] == "..":
        raise DistillError(f"{name!r} leads out of the repository {uri.id}: name a file inside it.")
    return replace(uri, path_in_repo=path)


def fetch(uri: HfUri, max_bytes: int | None = None) -> Fetched:
    """Download a file of a repository, or return it from the local cache if it is there or the Hub cannot be reached.

    Args:
        uri: the file; without a revision, the newest commit is used.
        max_bytes: a larger file is not downloaded; None: no limit.

    Raises:
        DistillError: see `translate_hub_errors`; or the file is larger than `max_bytes`.
    """
    download: Callable[..., Any] = partial(
        hf_hub_download, uri.id, uri.path_in_repo, repo_type=uri.type, revision=uri.revision
    )
    with translate_hub_errors(uri.id, uri.type, uri.revision, uri.path_in_repo):
        if max_bytes is not None:
            try:
                size = download(dry_run=True).file_size
            except (DryRunError, LocalEntryNotFoundError):  # offline: the size of a cached file is checked below
                size = None
            _check_size(uri, size, max_bytes)
        path = Path(download())
        _check_size(uri, path.stat().st_size, max_bytes)
    commit = path.parents[uri.path_in_repo.count("/")].name
    return Fetched(path, pin(uri, commit))


def _check_size(uri: HfUri, size: int | None, max_bytes: int | None) -> None:
    if size is not None and max_bytes is not None and size > max_bytes:
        raise DistillError(f"{format_uri(uri)} has {size:,} bytes; at most {max_bytes:,} bytes are read.")


def fetch_folder(uri: HfUri) -> Path:
    """Download a full repository and return its local folder.

    Raises:
        DistillError: see `translate_hub_errors`.
    """
    with translate_hub_errors(uri.id, uri.type, uri.revision):
        return Path(snapshot_download(uri.id, repo_type=uri.type, revision=uri.revision))


def yaml_files(uri: HfUri) -> list[HfUri]:
    """List the YAML files in a folder of a repository and its subfolders, at the current commit, without a download.

    Raises:
        DistillError: see `translate_hub_errors`; or the folder has no YAML files.
    """
    with translate_hub_errors(uri.id, uri.type, uri.revision, uri.path_in_repo):
        info: Any = HfApi().repo_info(uri.id, repo_type=uri.type, revision=uri.revision)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    prefix = f"{uri.path_in_repo}/" if uri.path_in_repo else ""
    paths = sorted(name for name in names if name.startswith(prefix) and name.endswith((".yaml", ".yml")))
    if not paths:
        raise DistillError(f"{format_uri(uri)} holds no YAML files; the repository has {len(names)} files.")
    return [replace(uri, revision=info.sha, path_in_repo=path) for path in paths]
