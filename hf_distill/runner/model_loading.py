"""Loads the models that recipes name: a path, an id, a GGUF file of an installed package, or a smoke model."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, overload
from uuid import uuid4

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.auto_factory import _BaseAutoModelClass
from transformers.utils import logging

from ..core.files import atomic_path
from ..core.references import SMOKE_PREFIX, reference_kind
from ..data import OtherTokenizer
from ..errors import DistillError, require_package
from ..hub import check_model, reading
from ..recipe import smoke
from ..recipe.local_files import packaged_file
from ..recipe.schema import Recipe
from ..recipe.smoke import build_tiny
from . import smoke_models

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LoadPolicy:
    """The permissions to load more than safetensors weights. A recipe cannot change them.

    Attributes:
        remote_code: Whether Python code of a model may run (`trust_remote_code`).
        pickles: Whether pickled weights may be loaded, which can run code.
    """

    remote_code: bool = False
    pickles: bool = False


_POLICY = ContextVar("_POLICY", default=LoadPolicy())  # noqa: B039  LoadPolicy is immutable


@contextmanager
def load_policy(policy: LoadPolicy) -> Iterator[None]:
    """Apply a policy to all models that are loaded within the block."""
    token = _POLICY.set(policy)
    try:
        yield
    finally:
        _POLICY.reset(token)


@overload
def load_pretrained(kind: type[_BaseAutoModelClass], reference: str, **options: object) -> PreTrainedModel: ...
@overload
def load_pretrained(kind: type[AutoTokenizer], reference: str, **options: object) -> PreTrainedTokenizerBase: ...
@overload
def load_pretrained(kind: type[AutoConfig], reference: str, **options: object) -> PreTrainedConfig: ...
@overload
def load_pretrained(kind: type[AutoImageProcessor], reference: str, **options: object) -> BaseImageProcessor: ...
@overload
def load_pretrained(kind: type[AutoProcessor], reference: str, **options: object) -> ProcessorMixin: ...
def load_pretrained(kind: Any, reference: str, **options: object) -> Any:
    """Call `kind.from_pretrained` for a model that a recipe names.

    Args:
        kind: AutoConfig, AutoTokenizer, AutoImageProcessor, AutoProcessor, or an auto class of models.
        reference: Reference of the model; see `resolve_model`.
        options: Arguments of from_pretrained.

    Raises:
        DistillError: The model does not exist or cannot be loaded, or it has Python code or pickled weights that the
            policy does not allow.
    """
    is_model = issubclass(kind, _BaseAutoModelClass)
    trust_kwargs = trust_options() if is_model else {"trust_remote_code": _POLICY.get().remote_code}
    path = resolve_model(reference)
    options |= check_and_pin(path, cast(str | None, options.get("revision")), is_model)
    try:
        with reading(reference):
            return kind.from_pretrained(path, **trust_kwargs, **options)
    except DistillError as error:
        if not _POLICY.get().remote_code and "trust_remote_code" in str(error):
            why = "contains Python code. Read it, and if you trust it, add --trust-remote-code."
            raise DistillError(f"{reference} {why}") from error.__cause__
        if kind is AutoTokenizer and _lacks_tokenizer(Path(path)):
            raise DistillError(
                f"The folder {reference} has no tokenizer, such as a tokenizer.json. Save the tokenizer of the model "
                f"into it: AutoTokenizer.from_pretrained(ID).save_pretrained({reference!r})."
            ) from error.__cause__
        hint = ""
        if not _POLICY.get().pickles and "safetensors" in str(error):
            hint = (
                " Pickled weights (.bin) can run code when they are loaded. Convert them to safetensors, or add "
                "--allow-pickles if you trust them."
            )
        raise DistillError(f"{error}{hint}") from error.__cause__


def _lacks_tokenizer(folder: Path) -> bool:
    """Whether a local folder has no file of a tokenizer."""
    patterns = ("*token*", "vocab*", "*.model", "*.tiktoken", "merges.txt")
    return folder.is_dir() and not any(file for pattern in patterns for file in folder.glob(pattern))


def check_and_pin(path: str, revision: str | None = None, weights: bool = True) -> dict[str, object]:
    """Check the files of a model against the policy, and pin the commit that was checked.

    Args:
        path: Folder or id; see `resolve_model`.
        revision: Revision of an id.
        weights: Whether weights are loaded, and not only the config or the tokenizer.

    Returns:
        The arguments of from_pretrained that select the checked commit.

    Raises:
        DistillError: The policy does not allow the files; see `hub.check_model`.
    """
    policy = _POLICY.get()
    files = check_model(path, revision, policy.remote_code, policy.pickles)
    if files.commit is None:
        return {}
    if files.adapter is None:
        return {"revision": files.commit}
    return (
        {"adapter_kwargs": {"revision": files.commit}} if weights else {}
    )  # `revision` would apply to the base model too


def trust_options() -> dict[str, bool]:
    """Return the arguments of from_pretrained by which the policy applies to the weights of a model."""
    policy = _POLICY.get()
    return {"trust_remote_code": policy.remote_code} | ({} if policy.pickles else {"use_safetensors": True})


def model_without_weights(kind: type[_BaseAutoModelClass], config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device, of Python code of its repository if the policy allows that.

    Args:
        kind: An auto class of models.
        config: The config of the model.
    """
    with torch.device("meta"):
        return kind.from_config(config, trust_remote_code=_POLICY.get().remote_code)


def vocabulary_size(reference: str, revision: str | None) -> int:
    """Return the number of ids that a language model predicts, from its config."""
    return int(load_pretrained(AutoConfig, reference, revision=revision).get_text_config().vocab_size)


def load_tokenizer_if_any(reference: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model; return None, with a warning, if it has none."""
    try:
        return load_pretrained(AutoTokenizer, reference, revision=revision)
    except DistillError as error:
        logger.warning(f"No tokenizer was loaded: {error}")
        return None


def load_teacher_tokenizers(recipe: Recipe) -> list[OtherTokenizer]:
    """Load the tokenizers of teachers that have another one than the student; empty without `distill.cross_tokenizer`.

    Raises:
        DistillError: A tokenizer cannot be loaded.
    """
    if not recipe.is_cross_tokenizer:
        return []
    loaded = {
        getattr(spec, "name", None): load_pretrained(
            AutoTokenizer, str(spec.tokenizer_model), revision=spec.tokenizer_revision
        )
        for spec in (recipe.teachers or recipe.all_teachers)
    }
    return [OtherTokenizer(tokenizer, name) for name, tokenizer in loaded.items()]


def resolve_model(reference: str) -> str:
    """Return a path or id that `from_pretrained` accepts.

    Args:
        reference: A path or id, which is returned unchanged; `package:module/file.gguf`, which is converted to
            safetensors once and cached; or `smoke:family/role`, a tiny random model, which is created once and cached.

    Raises:
        DistillError: The package is not installed or has no such file.
    """
    if reference_kind(reference) == "package":
        return str(_from_package(reference))
    if reference_kind(reference) == "smoke":
        family, _, role = reference.removeprefix(SMOKE_PREFIX).partition("/")
        module = smoke_models if family in smoke_models.FAMILIES else smoke
        code_digest = hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest()[:16]
        name = f"{reference.replace(':', '-').replace('/', '-')}-{code_digest}"
        build = smoke_models.FAMILIES.get(family)
        return str(_build_in_cache(name, lambda to: build_tiny(reference, to) if build is None else build(role, to)))
    return reference


def _from_package(reference: str) -> Path:
    file = packaged_file(reference)
    require_package("gguf", "gguf", "Reading a GGUF file")
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return _build_in_cache(f"{file.stem}-{digest[:16]}", lambda to: convert_gguf(file, to))


def convert_gguf(file: Path, to: Path) -> None:
    """Convert a GGUF file to a folder of safetensors and the tokenizer.

    transformers treats a model loaded from GGUF as quantized, which cannot be trained.

    Args:
        file: The GGUF file.
        to: The folder.
    """
    logger.warning(f"Converting {file.name} to safetensors. This happens once and takes about half a minute.")
    loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = AutoConfig.for_model(
        **{key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    plain.load_state_dict(loaded.state_dict())
    plain.tie_weights()
    plain.generation_config = loaded.generation_config
    plain.save_pretrained(to)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(to)


def _build_in_cache(name: str, make: Callable[[Path], None]) -> Path:
    """Build a folder in the user's cache atomically, and return its path."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_distill"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        try:
            with atomic_path(folder, suffix=f"{uuid4().hex}.half") as temporary:
                temporary.mkdir()
                make(temporary)
        except OSError:
            if not folder.is_dir():  # otherwise another process has built it first
                raise
    return folder
