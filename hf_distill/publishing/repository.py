"""The repository to publish to: the files it contains, which of them `publish` wrote, and what it may replace."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from ..core.references import is_id
from ..errors import DistillError
from ..hub import translate_hub_errors
from ..model_card import FILE, CardData

CARD = "README.md"
# Weights of any framework and format, the index files of their shards, and adapter_config.json.
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|npz|npy|h5|hdf5|keras|msgpack|onnx|onnx_data|gguf|ggml|ot|tflite|pb|"
    r"pdparams|mlmodel|llamafile|engine|nemo|mar|distcp)|.*\.(safetensors|bin|h5|msgpack)\.index\.json|"
    r"(.*/)?adapter_config\.json",
    re.IGNORECASE | re.DOTALL,
)
_MAX_NAMED_FILES = 5  # in an error


@dataclass(frozen=True)
class Repository:
    """A repository on the Hub before a student is published to it.

    name:      org/name
    commit:    the newest commit; None: the repository does not exist
    private:   whether it is private
    files:     path -> SHA-256 of the content, or None where the Hub does not return it
    published: files that `publish` wrote: path -> SHA-256, as listed in the repository's distillation.json
    bases:     ids of `base_model` on its card
    """

    name: str
    commit: str | None = None
    private: bool = False
    files: Mapping[str, str | None] = field(default_factory=dict)
    published: Mapping[str, str] = field(default_factory=dict)
    bases: tuple[str, ...] = ()

    def is_published(self, name: str) -> bool:
        """Whether `publish` wrote a file that has not been changed since, as far as the Hub shows."""
        digest = self.published.get(name)
        return (digest is not None and self.files[name] in (None, digest)) or (name == FILE and bool(self.published))

    def foreign(self, names: Iterable[str]) -> list[str]:
        """Return weights of any format and files to be written that `publish` did not write or that were changed."""
        return sorted(n for n in self.files if (is_weights(n) or n in {*names}) and not self.is_published(n))


def is_weights(name: str) -> bool:
    """Whether the name of a file is that of weights of a model or an adapter, in any format."""
    return _WEIGHTS.fullmatch(name) is not None


def check_repository_id(name: str, option: str = "REPO") -> None:
    """Check the form of a repository id without a request to the Hub.

    Args:
        name: org/name, or a name.
        option: the option or key that the error names.

    Raises:
        DistillError: `name` is not a repository id.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise DistillError(f"{option} is {name!r}, which is not a repository id (org/name, or name): {error}") from None


def read_repository(api: HfApi, name: str) -> Repository:
    """Read the state of a repository.

    Args:
        api: API client with the user's token.
        name: org/name.

    Raises:
        DistillError: the Hub refuses the request; see `translate_hub_errors`.
    """
    with translate_hub_errors(name):
        try:
            info = api.model_info(name, files_metadata=True)
        except RepositoryNotFoundError:
            return Repository(name)
        siblings = info.siblings or ()
        files = {s.rfilename: s.lfs.sha256 if s.lfs else None for s in siblings}
        contents = {n: _content(name, n, info.sha) for n in (FILE, CARD) if n in files}
    files |= {n: hashlib.sha256(content).hexdigest() for n, content in contents.items()}
    bases = info.card_data.to_dict().get("base_model") if info.card_data else None
    bases = [bases] if isinstance(bases, str) else bases or []
    return Repository(
        name, info.sha, bool(info.private), files, _published_files(contents.get(FILE, b"")), tuple(map(str, bases))
    )


def check_repository(
    repository: Repository, names: Iterable[str], private: bool, replace: bool, card_data: CardData | None = None
) -> None:
    """Raise if publishing would replace files that `publish` did not write.

    Args:
        repository: see `read_repository`.
        names: files to be written.
        private: whether the repository must be private.
        replace: replace its files.
        card_data: card data of the student; None before its run, when base models are not compared.

    Raises:
        DistillError: names the files, and what to do.
    """
    if repository.commit is None:
        return
    if private and not repository.private:
        raise DistillError(
            f"{repository.name} is a public repository, but --private was passed. Make it private in its settings on "
            "the Hub, or leave --private out."
        )
    if replace:
        return
    contents = ""
    if foreign := repository.foreign(names):
        more = f" and {len(foreign) - _MAX_NAMED_FILES} more" if len(foreign) > _MAX_NAMED_FILES else ""
        named = f"{', '.join(foreign[:_MAX_NAMED_FILES])}{more}"
        contents = f"files that hf-distill did not publish, or that were changed since: {named}"
    elif card_data is not None and any(map(is_weights, repository.files)):
        base = card_data.student.get("base_model") or card_data.student.get("model")
        bases = [str(base)] if is_id(base) else []
        if list(repository.bases) != bases:
            current, new = (", ".join(ids) or "unknown" for ids in (repository.bases, bases))
            contents = f"a model with another base model ({current}; the base model of this student is {new})"
    if contents:
        raise DistillError(
            f"{repository.name} contains {contents}. Choose another repository, or add --replace to "
            "`hf-distill publish`: the student replaces them, and they stay available in earlier commits."
        )


def files_to_delete(repository: Repository, names: Iterable[str], replace: bool) -> list[str]:
    """Return the files to delete: those of an earlier student, and with `replace` all other weights.

    Args:
        repository: see `read_repository`.
        names: files to be written.
        replace: replace its files.
    """
    others = {*repository.files} - {*names}
    return sorted(n for n in others if repository.is_published(n) or (replace and is_weights(n)))


def with_digests(card_data: Mapping[str, object], files: Mapping[str, str]) -> dict[str, object]:
    """Return the values of distillation.json: the card data, and the SHA-256 of each published file."""
    return {**card_data, "files": dict(sorted(files.items()))}


def _content(repo: str, name: str, commit: str | None) -> bytes:
    return Path(hf_hub_download(repo, name, revision=commit)).read_bytes()


def _published_files(content: bytes) -> dict[str, str]:
    """Return the files that a distillation.json lists; empty where it is not valid."""
    try:
        digests = json.loads(content)["files"]
        return {str(name): str(digest) for name, digest in digests.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
