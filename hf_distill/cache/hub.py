"""Teacher caches as data set repositories on the Hub."""

from dataclasses import replace as with_values
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.escape import markdown
from ..core.local_paths import reduced
from ..core.references import public_name, reference_kind
from ..errors import DistillError
from ..hub import fetch_folder, parse_uri, translate_hub_errors
from .manifest import FILE, Manifest, read_manifest
from .reader import verify_cache

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_CARD = """---
tags: [hf_distill, knowledge-distillation]
viewer: false
---

# Teacher cache of {model}: {examples:,} examples

Teacher signals for offline knowledge distillation, written by hf_distill: kind `{kind}`, {tokens:,} tokens,
{bytes_per_token:.1f} bytes per token. `manifest.json` names the model, tokenizer and data that they belong to.

```yaml
teacher: {{kind: cached, path: "hf://datasets/{repo}"}}
```
"""


def resolve_cache_dir(path: str) -> Path:
    """Return the local folder of a cache; a cache on the Hub is downloaded.

    Raises:
        DistillError: the URI is not one of a data set; or the Hub refuses, see `translate_hub_errors`.
    """
    if reference_kind(path) != "address":
        return Path(path)
    uri = parse_uri(path)
    if uri.type != "dataset" or uri.path_in_repo:
        raise DistillError(f"{path!r} is not the URI of a data set: write hf://datasets/org/name[@revision].")
    return fetch_folder(uri)


def push_cache(folder: str | Path, repo: str, private: bool = False, replace: bool = False) -> str:
    """Verify a cache and upload it as a data set repository.

    Args:
        folder: the folder of the cache.
        repo: the repository, org/name; it is created if it does not exist.
        private: whether the repository is private; a public one is an error.
        replace: replace another cache, and files that hf-distill did not write, such as a card.

    Returns:
        the URI with the revision of the upload, which `path` of a cached teacher accepts.

    Raises:
        DistillError: files are missing or damaged; the repository holds another cache or files that hf-distill did not
            write, or is public although `private` is set; or the Hub refuses, see `translate_hub_errors`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    manifest, api = verify_cache(folder), HfApi()
    card = _CARD.format(
        model=markdown(public_name(manifest.teacher["model"])),
        kind=manifest.kind,
        bytes_per_token=manifest.bytes_per_token,
        repo=repo,
        examples=manifest.data["examples"],
        tokens=manifest.data["tokens"],
    )
    public = with_values(manifest, teacher=reduced(manifest.teacher), recipe=reduced(manifest.recipe))
    uploads: dict[str, bytes | Path] = {"README.md": card.encode(), FILE: public.as_text().encode()}
    uploads |= {entry["file"]: folder / entry["file"] for entry in manifest.files}
    remote_files, remote_manifest = _inspect_repo(api, repo, private)
    if not replace:
        _check_repo(repo, remote_files, remote_manifest, public, {*uploads})
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content) for name, content in uploads.items()
    ]
    replaced = {entry["file"] for entry in remote_manifest.files} if remote_manifest else set()
    operations += [CommitOperationDelete(name) for name in sorted((replaced & remote_files) - {*uploads})]
    with translate_hub_errors(repo, "dataset"):
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        commit = api.create_commit(repo, operations, repo_type="dataset", commit_message="Cache of hf_distill")
    return f"hf://datasets/{repo}@{commit.oid}"


def _inspect_repo(api: "HfApi", repo: str, private: bool) -> tuple[set[str], Manifest | None]:
    """Return the file names of a data set repository, and the manifest of the cache that `push_cache` wrote there.

    Raises:
        DistillError: `private` is set, and the repository is public.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    with translate_hub_errors(repo, "dataset"):
        try:
            info = api.dataset_info(repo)
        except RepositoryNotFoundError:
            return set(), None
        if private and not info.private:
            raise DistillError(
                f"datasets/{repo} is a public repository, but --private was passed. Make it private in its settings on "
                "the Hub, or leave --private out."
            )
        names = {sibling.rfilename for sibling in info.siblings or ()}
        tags = info.card_data.to_dict().get("tags") if info.card_data else None
        if FILE not in names or "hf_distill" not in (tags or ()):
            return names, None
        file = hf_hub_download(repo, FILE, repo_type="dataset", revision=info.sha)
    try:
        return names, read_manifest(Path(file).parent)
    except DistillError:  # a damaged manifest, or one of another version, does not prove that hf-distill wrote it
        return names, None


def _check_repo(
    repo: str, remote_files: set[str], remote_manifest: Manifest | None, pushed: Manifest, uploads: set[str]
) -> None:
    """Refuse a repository in which the upload would replace another cache or other files."""
    foreign = sorted(remote_files & uploads)
    if remote_manifest is not None and (differences := remote_manifest.differs(pushed)):
        content = f"another cache ({'; '.join(differences)})"
    elif remote_manifest is None and foreign:
        content = f"files that hf-distill did not write ({', '.join(foreign[:5])})"
    else:
        return
    raise DistillError(
        f"datasets/{repo} holds {content}. Choose another repository, or add --replace to replace them; earlier "
        "commits keep the replaced files."
    )
