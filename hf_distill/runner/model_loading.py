"""What a recipe's `model:` may name: a path, an id, a file in an installed package, or a tiny random model."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..core.references import reference_kind
from ..errors import DistillError, require_package
from ..hub import check_model, reading
from ..recipe import smoke
from ..recipe.local_files import packaged_file
from ..recipe.smoke import build_tiny

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class LoadPolicy:
    """What a model may bring beside safetensors; recipes have no say in it.

    remote_code: Python of its own (`trust_remote_code`)
    pickles:     weights that are pickled, of which reading can be running
    """

    remote_code: bool = False
    pickles: bool = False


_TRUST = ContextVar("_TRUST", default=LoadPolicy())  # noqa: B039  it cannot change


@contextmanager
def load_policy(trust: LoadPolicy) -> Iterator[None]:
    """What models loaded within the block may bring."""
    token = _TRUST.set(trust)
    try:
        yield
    finally:
        _TRUST.reset(token)


def load_pretrained(kind: Any, reference: str, **options) -> Any:
    """`kind.from_pretrained` of what a recipe names.

    Args:
        kind: AutoModelForCausalLM, AutoTokenizer or AutoConfig.
        reference: see `resolve_model`.
        options: of from_pretrained.

    Raises:
        DistillError: see `resolve_model`; there is no such model, or it brings code or pickles that nobody said are
            trusted.
    """
    given = trust_options() if kind is AutoModelForCausalLM else {"trust_remote_code": _TRUST.get().remote_code}
    path = resolve_model(reference)
    options |= checked(path, options.get("revision"), kind is AutoModelForCausalLM)
    try:
        with reading(reference):
            return kind.from_pretrained(path, **given, **options)
    except DistillError as error:
        if not _TRUST.get().remote_code and "trust_remote_code" in str(error):
            why = "brings Python code of its own. Read it; if you trust it, add --trust-remote-code."
            raise DistillError(f"{reference} {why}") from error.__cause__
        hint = ""
        if not _TRUST.get().pickles and "safetensors" in str(error):
            hint = " Pickled weights (.bin) can run what is inside: convert them, or trust them with --allow-pickles."
        raise DistillError(f"{error}{hint}") from error.__cause__


def checked(path: str, revision: str | None = None, weights: bool = True) -> dict[str, Any]:
    """Check what a model's files ask for; the options of from_pretrained that read the commit which was checked.

    Args:
        path: a folder or id; see `resolve_model`.
        revision: of an id.
        weights: whether weights are read, and not the config or the tokenizer alone.

    Raises:
        DistillError: see `hub.check_model`.
    """
    trust = _TRUST.get()
    files = check_model(path, revision, trust.remote_code, trust.pickles)
    if files.commit is None:
        return {}
    if files.adapter is None:
        return {"revision": files.commit}
    return {"adapter_kwargs": {"revision": files.commit}} if weights else {}  # `revision` would be the base's, too


def trust_options() -> dict[str, bool]:
    """Of from_pretrained, for a model's weights."""
    trust = _TRUST.get()
    return {"trust_remote_code": trust.remote_code} | ({} if trust.pickles else {"use_safetensors": True})


def resolve_model(reference: str) -> str:
    """A path or id that `from_pretrained` takes.

    Args:
        reference: a path or id, returned as it is; `package:module/file.gguf`, converted to safetensors once and kept
            in the user's cache; or `smoke:family/role`.

    Raises:
        DistillError: the package is not installed or has no such file.
    """
    if reference_kind(reference) == "package":
        return str(_from_package(reference))
    if reference_kind(reference) == "smoke":
        made_by = hashlib.sha256(Path(str(smoke.__file__)).read_bytes()).hexdigest()[:16]
        name = f"{reference.replace(':', '-').replace('/', '-')}-{made_by}"
        return str(_cached(name, lambda to: build_tiny(reference, to)))
    return reference


def _from_package(reference: str) -> Path:
    file = packaged_file(reference)
    require_package("gguf", "gguf", "Reading a GGUF file")
    with file.open("rb") as f:
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    return _cached(f"{file.stem}-{digest[:16]}", lambda to: _convert(file, to))


def _convert(file: Path, to: Path) -> None:
    """GGUF to plain safetensors. A model loaded from GGUF counts as quantised, which neither saves nor trains."""
    logger.warning(f"Converting {file.name} to safetensors, once (half a minute).")
    load_pretrained = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = AutoConfig.for_model(
        **{k: v for k, v in load_pretrained.config.to_dict().items() if k != "quantization_config"}
    )
    plain = AutoModelForCausalLM.from_config(config, dtype=load_pretrained.dtype)
    plain.load_state_dict(load_pretrained.state_dict())
    plain.tie_weights()
    plain.generation_config = load_pretrained.generation_config
    plain.save_pretrained(to)
    tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer.save_pretrained(to)


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """A folder of the user's cache, made whole or not at all."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "hf_distill"
    folder = cache / name
    if not folder.is_dir():
        cache.mkdir(parents=True, exist_ok=True)
        half = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=cache))
        try:
            make(half)
            half.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first
                raise
        finally:
            shutil.rmtree(half, ignore_errors=True)
    return folder
