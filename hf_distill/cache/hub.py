"""Caches on the Hub: data set repositories."""

from dataclasses import replace as with_values
from pathlib import Path
from typing import Any

from ..core.escape import markdown
from ..core.local_paths import reduced
from ..core.references import public_name, reference_kind
from ..errors import DistillError
from ..hub import fetch_folder, parse_uri, translate_hub_errors
from .manifest import FILE, Manifest, read_manifest
from .reader import verify_cache

_CARD = """---
tags: [hf_distill, knowledge-distillation]
viewer: false
---

# What {model} says of {examples:,} examples

A teacher's signals for knowledge distillation, written by hf_distill: kind `{kind}`, {tokens:,} tokens,
{bytes_per_token:.1f} bytes a token. `manifest.json` says which model, tokenizer and data they belong to.

```yaml
teacher: {{kind: cached, path: "hf://datasets/{repo}"}}
```
"""


def resolve_cache_dir(path: str) -> Path:
    """The folder of a cache on this machine; one on the Hub is downloaded, whole.

    Raises:
        DistillError: the address is not one of a data set; or the Hub refuses, see `hub.asking`.
    """
    if reference_kind(path) != "address":
        return Path(path)
    at = parse_uri(path)
    if at.type != "dataset" or at.path_in_repo:
        raise DistillError(f"{path!r} is no address of a data set: write hf://datasets/org/name, or with @revision.")
    return fetch_folder(at)


def push_cache(folder: str | Path, repo: str, private: bool = False, replace: bool = False) -> str:
    """Check a cache and upload it as a data set repository.

    Args:
        folder: of the cache.
        repo: org/name; made if there is none.
        private: of a new one.
        replace: take the place of another cache, and of files of somebody else, such as a card.

    Returns:
        its address, as `path` of a cached teacher takes it: the revision is the upload's.

    Raises:
        DistillError: files are missing or damaged; the repository holds another cache or files of somebody else; or the
            Hub refuses, see `hub.asking`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    folder = Path(folder)
    manifest, api = verify_cache(folder), HfApi()
    card = _CARD.format(
        model=markdown(public_name(manifest.teacher["model"])),
        kind=manifest.kind,
        bytes_per_token=manifest.bytes_per_token,
        repo=repo,
        **{name: manifest.data[name] for name in ("examples", "tokens")},
    )
    shown = with_values(manifest, teacher=reduced(manifest.teacher), recipe=reduced(manifest.recipe))
    written: dict[str, Any] = {"README.md": card.encode(), FILE: shown.as_text().encode()}
    written |= {entry["file"]: folder / entry["file"] for entry in manifest.files}
    present, stored = _present(api, repo)
    if not replace:
        _check_present(repo, present, stored, shown, {*written})
    files: list[Any] = [CommitOperationAdd(name, content) for name, content in written.items()]
    replaced = {entry["file"] for entry in stored.files} if stored else set()
    files += [CommitOperationDelete(name) for name in sorted((replaced & present) - {*written})]
    with translate_hub_errors(repo, "dataset"):
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        done = api.create_commit(repo, files, repo_type="dataset", commit_message="Cache of hf_distill")
    return f"hf://datasets/{repo}@{done.oid}"


def _present(api: Any, repo: str) -> tuple[set[str], Manifest | None]:
    """The names of a data set repository's files, and the manifest of the cache that `push_cache` wrote there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RepositoryNotFoundError

    with translate_hub_errors(repo, "dataset"):
        try:
            info: Any = api.dataset_info(repo)
        except RepositoryNotFoundError:
            return set(), None
        names = {sibling.rfilename for sibling in info.siblings or ()}
        tags = info.card_data.to_dict().get("tags") if info.card_data else None
        if FILE not in names or "hf_distill" not in (tags or ()):
            return names, None
        file = hf_hub_download(repo, FILE, repo_type="dataset", revision=info.sha)
    try:
        return names, read_manifest(Path(file).parent)
    except DistillError:  # damaged, or of another version: nothing is known of these files
        return names, None


def _check_present(repo: str, present: set[str], stored: Manifest | None, pushed: Manifest, names: set[str]) -> None:
    """Refuse a repository whose files would be replaced by those of another cache."""
    foreign = sorted(present & names)
    if stored is not None and (differences := stored.differs(pushed)):
        what = f"another cache ({'; '.join(differences)})"
    elif stored is None and foreign:
        what = f"files that hf-distill did not write ({', '.join(foreign[:5])})"
    else:
        return
    raise DistillError(
        f"datasets/{repo} holds {what}. Give another name, or add --replace: this cache takes its place, and earlier "
        "commits keep what is there now."
    )
