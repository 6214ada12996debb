"""Caches on the Hub: data set repositories."""

from pathlib import Path

from ..errors import DistillError
from ..hub import address, asking, fetch_folder
from ..names import kind_of
from .manifest import FILE
from .store import check_all

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


def folder_of(path: str) -> Path:
    """The folder of a cache on this machine; one on the Hub is downloaded, whole.

    Raises:
        DistillError: the address is not one of a data set; or the Hub refuses, see `hub.asking`.
    """
    if kind_of(path) != "address":
        return Path(path)
    at = address(path)
    if at.type != "dataset" or at.path_in_repo:
        raise DistillError(f"{path!r} is no address of a data set: write hf://datasets/org/name, or with @revision.")
    return fetch_folder(at)


def push_cache(folder: str | Path, repo: str, private: bool = False) -> str:
    """Check a cache and upload it as a data set repository.

    Args:
        folder: of the cache.
        repo: org/name; made if there is none.
        private: of a new one.

    Returns:
        its address, as `path` of a cached teacher takes it: the revision is the upload's.

    Raises:
        DistillError: files are missing or damaged; or the Hub refuses, see `hub.asking`.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = Path(folder)
    manifest, api = check_all(folder), HfApi()
    card = _CARD.format(
        model=manifest.teacher["model"],
        kind=manifest.kind,
        bytes_per_token=manifest.bytes_per_token,
        repo=repo,
        **{name: manifest.data[name] for name in ("examples", "tokens")},
    )
    names = [FILE, *(entry["file"] for entry in manifest.files)]
    files = [CommitOperationAdd("README.md", card.encode()), *(CommitOperationAdd(n, folder / n) for n in names)]
    with asking(repo, "dataset"):
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        done = api.create_commit(repo, files, repo_type="dataset", commit_message="Cache of hf_distill")
    return f"hf://datasets/{repo}@{done.oid}"
