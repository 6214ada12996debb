"""The repository that a student goes to: what is there already, whose it is, and what publishing may replace."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..core.references import is_id
from ..errors import DistillError
from ..hub import translate_hub_errors
from ..model_card import FILE, CardData

CARD = "README.md"
# Weights of any framework and format, the index files of their shards, and what makes a folder one of adapters.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|npz|npy|h5|hdf5|keras|msgpack|onnx|onnx_data|gguf|ggml|ot|tflite|pb|"
    r"pdparams|mlmodel|llamafile|engine|nemo|mar|distcp)|.*\.(safetensors|bin|h5|msgpack)\.index\.json|"
    r"(.*/)?adapter_config\.json",
    re.IGNORECASE | re.DOTALL,
)
_NAMED = 5  # files that an error names


@dataclass(frozen=True)
class Repository:
    """A repository before a student goes to it.

    name:      org/name
    commit:    its newest; None: there is no such repository
    private:   whether it is
    files:     its files: path -> SHA-256 of its content, or None where the Hub does not tell it
    published: files that `publish` wrote there: path -> SHA-256, as the repository's distillation.json lists them
    bases:     ids of `base_model` on its card
    """

    name: str
    commit: str | None = None
    private: bool = False
    files: Mapping[str, str | None] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    bases: tuple[str, ...] = ()

    def is_published(self, name: str) -> bool:
        """Whether `publish` wrote a file, and nobody is known to have changed it since."""
        known = self.published.get(name)
        return (known is not None and self.files[name] in (None, known)) or (name == FILE and bool(self.published))

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Weights of any format, and files that are to be written, that somebody else put there or changed."""
        return sorted(n for n in self.files if (is_weights(n) or n in {*names}) and not self.is_published(n))


def is_weights(name: str) -> bool:
    """Whether a file of a repository is weights of a model or of an adapter, in any format, by its name."""
    return _WEIGHTS.fullmatch(name) is not None


def check_repository_id(name: str, option: str = "REPO") -> None:
    """Refuse what cannot be the id of a repository, without asking the Hub.

    Args:
        name: org/name, or a name.
        option: where it was given.

    Raises:
        DistillError: says which form an id has.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DistillError(
            f"{option} is {name!r}, which is no id of a repository (org/name, or name): {error}"
        ) from None


def look_at(api: HfApi, name: str) -> Repository:
    """What a repository holds.

    Args:
        api: with the user's token.
        name: org/name.

    Raises:
        DistillError: see `hub.asking`.
    """
    with translate_hub_errors(name):
        try:
            info: Any = api.model_info(name, files_metadata=True)
        except RepositoryNotFoundError:
            return Repository(name)
        siblings = info.siblings or ()
        files = {s.rfilename: s.lfs.sha256 if s.lfs else None for s in siblings}
        small = {n: _content(name, n, info.sha) for n in (FILE, CARD) if n in files}
    files |= {n: hashlib.sha256(content).hexdigest() for n, content in small.items()}
    bases = info.card_data.to_dict().get("base_model") if info.card_data else None
    bases = [bases] if isinstance(bases, str) else bases or []
    return Repository(
        name, info.sha, bool(info.private), files, _published(small.get(FILE, b"")), tuple(map(str, bases))
    )


def check_repository(
    there: Repository, names: Iterable[str], private: bool, replace: bool, facts: CardData | None = None
) -> None:
    """Refuse a repository in which publishing would replace what it did not write.

    Args:
        there: see `look_at`.
        names: files that are to be written.
        private: the repository must be.
        replace: take the place of what is there.
        facts: of the student; None: before its run, when its base is not compared.

    Raises:
        DistillError: says what is there, and what to do.
    """
    if there.commit is None:
        return
    if private and not there.private:
        raise DistillError(f"{there.name} is public already, and --private is wanted: make it private on its page.")
    if replace:
        return
    what = ""
    if foreign := there.foreign(names):
        more = f" and {len(foreign) - _NAMED} more" if len(foreign) > _NAMED else ""
        what = f"files that hf-distill did not publish, or that were changed since: {', '.join(foreign[:_NAMED])}{more}"
    elif facts is not None and any(map(is_weights, there.files)):
        own = facts.student.get("base_model") or facts.student.get("model")
        own = [own] if is_id(own) else []
        if list(there.bases) != own:
            known, mine = (", ".join(bases) or "not said" for bases in (there.bases, own))
            what = f"a model with another base ({known}; this one's: {mine})"
    if what:
        raise DistillError(
            f"{there.name} holds {what}. Give another name, or add --replace to `hf-distill publish`: the student "
            "takes their place, and earlier commits keep them."
        )


def to_delete(there: Repository, names: Iterable[str], replace: bool) -> list[str]:
    """Files of a repository that do not stay: those of an earlier student, and with `replace` all other weights.

    Args:
        there: see `look_at`.
        names: files that are to be written.
        replace: take the place of what is there.
    """
    gone = {*there.files} - {*names}
    return sorted(n for n in gone if there.is_published(n) or (replace and is_weights(n)))


def with_digests(facts: Mapping[str, Any], files: Mapping[str, str]) -> dict[str, Any]:
    """The values of distillation.json: the facts, and the SHA-256 of each file that is published beside it."""
    return {**facts, "files": dict(sorted(files.items()))}


def _content(repo: str, name: str, commit: str) -> bytes:
    return Path(hf_hub_download(repo, name, revision=commit)).read_bytes()


def _published(content: bytes) -> dict[str, str]:
    """The files that a distillation.json lists; none where it is not one."""
    try:
        listed = json.loads(content)["files"]
        return {str(name): str(digest) for name, digest in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
