"""Caches on the Hub: data set repositories."""

import re
from pathlib import Path

from ..errors import DistillError
from .manifest import FILE
from .store import check_all

_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^@]+))?/?")
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
        DistillError: the address is not one of a data set.
    """
    if not path.startswith("hf://"):
        return Path(path)
    found = _HUB.fullmatch(path)
    if found is None:
        raise DistillError(f"{path!r} is no address of a data set: write hf://datasets/org/name, or with @revision.")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(found["repo"], repo_type="dataset", revision=found["revision"]))


def push_cache(folder: str | Path, repo: str, private: bool = False) -> str:
    """Check a cache and upload it as a data set repository.

    Args:
        folder: of the cache.
        repo: org/name; made if there is none.
        private: of a new one.

    Returns:
        its address, as `path` of a cached teacher takes it: the revision is the upload's.

    Raises:
        DistillError: files are missing or damaged.
    """
    from huggingface_hub import HfApi

    folder = Path(folder)
    manifest, api = check_all(folder), HfApi()
    api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
    card = _CARD.format(
        model=manifest.teacher["model"],
        kind=manifest.kind,
        bytes_per_token=manifest.bytes_per_token,
        repo=repo,
        **{name: manifest.data[name] for name in ("examples", "tokens")},
    )
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=repo, repo_type="dataset")
    names = [FILE, *(entry["file"] for entry in manifest.files)]
    done = api.upload_folder(folder_path=folder, repo_id=repo, repo_type="dataset", allow_patterns=names)
    return f"hf://datasets/{repo}@{done.oid}"
