"""Files of repositories, by addresses such as hf://org/name@revision/file or hf://datasets/org/name/file."""

import posixpath
from dataclasses import dataclass, replace
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
    """A file that was downloaded.

    path:    on this machine; what lies beside it are files of the same commit
    parse_uri: with the commit as revision
    """

    path: Path
    parse_uri: HfUri


def parse_uri(text: str) -> HfUri:
    """An address of a model or data set repository, or of something in one.

    Raises:
        DistillError: it is none; says how one is written.
    """
    try:
        found = parse_hf_uri(text)
    except HfUriError as error:
        raise DistillError(f"{text!r} is no address on the Hub: {error.msg} Write {_FORM}.") from None
    if found.type not in ("model", "dataset"):
        raise DistillError(f"{text!r} is a {found.type}, and no model or data set repository. Write {_FORM}.")
    if ".." in found.path_in_repo.split("/"):
        raise DistillError(f"{text!r} leads out of its repository.")
    return found


_FORM = "hf://org/name[@revision]/file, or hf://datasets/org/name[@revision]/file"


def format_uri(at: HfUri) -> str:
    """An address as users write it."""
    return at.to_uri().replace(f"{HUB_PREFIX}models/", HUB_PREFIX)


def pin(at: HfUri, commit: str) -> HfUri:
    """The same place, at a commit."""
    return replace(at, revision=commit)


def sibling_uri(at: HfUri, name: str) -> HfUri:
    """A file of the same repository and revision, named as a file that lies at `at` would name it.

    Raises:
        DistillError: it leads out of the repository.
    """
    path = posixpath.normpath(posixpath.join(posixpath.dirname(at.path_in_repo), name))
    if name.startswith(("/", "~")) or "\\" in name or path.split("/")[0] == "..":
        raise DistillError(f"{name!r} leads out of the repository {at.id}.")
    return replace(at, path_in_repo=path)


def fetch(at: HfUri, limit: int | None = None) -> Fetched:
    """A file of a repository; from the cache where it is there already, and where the Hub is out of reach.

    Args:
        at: where; without a revision the newest.
        limit: bytes, of larger ones nothing is downloaded.

    Raises:
        DistillError: see `translate_hub_errors`; it is larger than `limit`.
    """
    asked: Any = {"repo_id": at.id, "filename": at.path_in_repo, "repo_type": at.type, "revision": at.revision}
    with translate_hub_errors(at.id, at.type, at.revision, at.path_in_repo):
        if limit is not None:
            try:
                size = hf_hub_download(**asked, dry_run=True).file_size
            except (DryRunError, LocalEntryNotFoundError):  # offline: what is in the cache was small enough
                size = None
            _check_size(at, size, limit)
        path = Path(hf_hub_download(**asked))
        _check_size(at, path.stat().st_size, limit)
    commit = path.parents[at.path_in_repo.count("/")].name
    return Fetched(path, pin(at, commit))


def _check_size(at: HfUri, size: int | None, limit: int | None) -> None:
    if size is not None and limit is not None and size > limit:
        raise DistillError(f"{format_uri(at)} has {size:,} bytes; at most {limit:,} are read.")


def fetch_folder(at: HfUri) -> Path:
    """A whole repository, on this machine.

    Raises:
        DistillError: see `translate_hub_errors`.
    """
    with translate_hub_errors(at.id, at.type, at.revision):
        return Path(snapshot_download(at.id, repo_type=at.type, revision=at.revision))


def yaml_files(at: HfUri) -> list[HfUri]:
    """YAML files in a folder of a repository and below it, at the commit that it has now; without a download.

    Raises:
        DistillError: see `translate_hub_errors`; the folder holds none.
    """
    with translate_hub_errors(at.id, at.type, at.revision, at.path_in_repo):
        info: Any = HfApi().repo_info(at.id, repo_type=at.type, revision=at.revision)
    names = [sibling.rfilename for sibling in info.siblings or ()]
    inside = f"{at.path_in_repo}/" if at.path_in_repo else ""
    found = sorted(name for name in names if name.startswith(inside) and name.endswith((".yaml", ".yml")))
    if not found:
        raise DistillError(f"{format_uri(at)} holds no YAML files; the repository has {len(names)} files.")
    return [replace(at, revision=info.sha, path_in_repo=name) for name in found]
