"""Checks of the configuration files of a model, which are as untrusted as whoever uploaded them. Imports no torch.

A `config.json` can name kernels of other repositories, which transformers downloads and runs; an `adapter_config.json`
names the base model that is loaded; the index of the shards names the weight files, which may be pickles. These files
are therefore checked before transformers reads them, and every value that is not known to be harmless is refused.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from huggingface_hub.file_download import repo_folder_name

from ..core.json_types import JSON, JSONObject
from ..core.references import path_exists, reference_kind
from ..errors import DistillError
from .errors import translate_hub_errors

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
EXPERTS = ("eager", "batched_mm", "grouped_mm")
CONFIG, ADAPTER, INDEX, TOKENIZER = (
    *("config.json", "adapter_config.json", "model.safetensors.index.json", "tokenizer_config.json"),
)
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_FILES = {"config": CONFIG, "adapter": ADAPTER, "index": INDEX, "tokenizer": TOKENIZER}
_MAX_JSON_BYTES = 64 * 2**20  # about the size of the index of a model with a million tensors
_SHARD = re.compile(r"[\w][\w.-]*\.safetensors")
_FILE_KEY = re.compile(r"(?:^|_)(?:path|file|dir|folder|url)$", re.IGNORECASE)
_KERNELS = "names a kernel on the Hub, which would be downloaded and run"


@dataclass(frozen=True)
class ModelFiles:
    """The configuration files of a model that decide what is loaded, parsed from JSON; None: there is no such file.

    name:      the model, as the user or the recipe names it
    revision:  the requested revision
    is_local:  whether the model is a local folder
    commit:    the commit of the files; None if it is not known
    config, adapter, index, tokenizer: contents of the files named by the constants above
    has_safe_adapter: whether the adapter's weights are in safetensors
    """

    name: str
    revision: str | None
    is_local: bool
    commit: str | None = None
    config: JSONObject | None = None
    adapter: JSONObject | None = None
    index: JSONObject | None = None
    tokenizer: JSONObject | None = None
    has_safe_adapter: bool = False

    @property
    def base(self) -> JSON:
        """The base model that the adapter's config names; None without an adapter."""
        return None if self.adapter is None else self.adapter.get("base_model_name_or_path")


def model_files(name: str, revision: str | None = None) -> ModelFiles:
    """Read the configuration files of a model that decide what is loaded; no weights are downloaded.

    Args:
        name: an id on the Hub, or a local folder.
        revision: the revision of a model on the Hub.

    Raises:
        DistillError: see `translate_hub_errors`; a file is not a JSON object; the Hub cannot be reached and no file of
            the model is in the local cache.
    """
    is_local, commit, is_reachable = reference_kind(name) != "id", None, True
    parts: dict[str, JSONObject | None] = {}
    for key, file in _FILES.items():
        path = Path(name) / file if is_local else None
        if path is None:
            path, is_reachable = _fetch_file(name, file, commit or revision, is_reachable)
        elif not (path_exists(path) and path.is_file()):
            path = None
        parts[key] = None if path is None else _read_json_object(path, f"{name}: {file}")
        commit = commit or (path.parent.name if path is not None and not is_local else None)
    safe = parts["adapter"] is not None and _has_file(name, ADAPTER_WEIGHTS, commit or revision, is_local)
    return ModelFiles(name, revision, is_local, commit, **parts, has_safe_adapter=safe)


def check_model(name: str, revision: str | None = None, remote_code: bool = False, pickles: bool = False) -> ModelFiles:
    """Refuse a model whose files request code, pickles or local files; the base model of an adapter is checked too.

    Args:
        name: an id on the Hub, or a local folder.
        revision: the revision of a model on the Hub.
        remote_code: whether the user trusts the code of the model.
        pickles: whether the user trusts pickled weights of the model.

    Raises:
        DistillError: see `model_files`; or a file requests one of these. The message names the file, key and value.
    """
    files = model_files(name, revision)
    problems = [*_model_problems(files, remote_code, pickles)]
    if problems:
        raise DistillError(f"{name}: {'; '.join(problems)}")
    if isinstance(files.base, str) and (not files.is_local or reference_kind(files.base) == "id"):
        base = model_files(files.base)
        if base.adapter is not None:
            raise DistillError(
                f"{name} is an adapter for {files.base}, which is an adapter itself: use an adapter for a full model."
            )
        if problems := [*_model_problems(base, remote_code, pickles)]:
            raise DistillError(f"{files.base}, the base of {name}: {'; '.join(problems)}")
    return files


def check_adapter(files: ModelFiles) -> str:
    """Return the base model of an adapter after a check of the adapter's config; weights are not checked.

    Raises:
        DistillError: the base is no model on the Hub, or the adapter's config names files or modules.
    """
    if problems := [*_adapter_problems(files, pickles=True)]:
        raise DistillError(f"{files.name}: {'; '.join(problems)}")
    return str(files.base)


def _model_problems(files: ModelFiles, remote_code: bool, pickles: bool) -> Iterator[str]:
    if files.config is not None:
        yield from _config_problems(files.config, remote_code)
    if files.adapter is not None:
        yield from _adapter_problems(files, pickles)
    if files.index is not None:
        weight_map = files.index.get("weight_map")
        shards = {*map(str, weight_map.values())} if isinstance(weight_map, dict) else {"weight_map is missing"}
        for shard in sorted(shard for shard in shards if not _SHARD.fullmatch(shard)):
            yield f"{INDEX} names {shard!r}, which is no safetensors file of the repository"
    if files.tokenizer is not None and not files.is_local:
        for key, value in _walk(files.tokenizer):
            if _FILE_KEY.search(key) and isinstance(value, str) and "/" in value and path_exists(value):
                yield f"{TOKENIZER}: {key} is {value!r}, which is a file on this machine"


def _config_problems(config: JSONObject, remote_code: bool) -> Iterator[str]:
    """Yield an error for each kernel, weight file elsewhere and other model that a config names, at any depth."""
    hint = "read it; if you trust it, add --trust-remote-code"
    for key, value in _walk(config):
        names = [*value.values()] if isinstance(value, dict) else [value]
        unknown = [name for name in names if name is not None]
        if key.endswith("attn_implementation") or key == "_attn_implementation_internal":
            unknown = [name for name in unknown if name not in ATTENTION]
        elif key.endswith("experts_implementation") or key == "_experts_implementation_internal":
            unknown = [name for name in unknown if name not in EXPERTS]
        elif key == "transformers_weights":
            if (
                not (isinstance(value, str) and _SHARD.fullmatch(value.removesuffix(".index.json")))
                and value is not None
            ):
                yield f"{CONFIG}: transformers_weights is {value!r}; it may only name safetensors of its repository"
            continue
        elif key == "use_pretrained_backbone" and value is True:
            yield f"{CONFIG}: use_pretrained_backbone would load another repository"
            continue
        else:
            continue
        if unknown and not remote_code:
            yield f"{CONFIG}: {key} is {unknown[0]!r}, which {_KERNELS}: {hint}"


def _adapter_problems(files: ModelFiles, pickles: bool) -> Iterator[str]:
    base = files.base
    if not isinstance(base, str) or not base:
        yield f"{ADAPTER}: base_model_name_or_path is {base!r}; it must name a model"
    elif not files.is_local and reference_kind(base) != "id":
        yield (
            f"{ADAPTER}: base_model_name_or_path is {base!r}, which is a local path; it must be the id of a model on "
            "the Hub"
        )
    if not files.has_safe_adapter and not pickles:
        yield (
            f"the adapter's weights are not in safetensors ({ADAPTER_WEIGHTS} is missing), and reading a pickle can "
            "run code: convert the weights, or allow pickles with --allow-pickles if you trust them"
        )
    for key, value in _walk(files.adapter):
        names_file = _FILE_KEY.search(key) and key != "base_model_name_or_path"
        if (names_file or key in ("megatron_config", "tokenizer_kwargs")) and value:
            yield f"{ADAPTER}: {key} is {value!r}; an adapter may name no files, modules or loading options"


def _walk(value: JSON) -> Iterator[tuple[str, JSON]]:
    """Yield all keys of nested dicts and lists with their values."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            yield from ((str(key), inner) for key, inner in item.items())
            stack += item.values()
        elif isinstance(item, list):
            stack += item


def _read_json_object(path: Path, what: str) -> JSONObject:
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise DistillError(f"{what} has {size:,} bytes; at most {_MAX_JSON_BYTES:,} bytes are read.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DistillError(f"{what} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DistillError(f"{what} holds a value of type {type(content).__name__}; it must hold a JSON object.")
    return content


def _fetch_file(name: str, file: str, revision: str | None, is_reachable: bool) -> tuple[Path | None, bool]:
    """Find a file of a model on the Hub, downloaded if needed; the Hub is asked again only if it answered before.

    Returns:
        (the local path of the file, None if the model has no such file; whether the Hub can be reached).

    Raises:
        DistillError: see `translate_hub_errors`; the Hub cannot be reached and no file of the model is in the cache.
    """
    with translate_hub_errors(name, "model", revision, file):
        try:
            return Path(hf_hub_download(name, file, revision=revision, local_files_only=not is_reachable)), is_reachable
        except LocalEntryNotFoundError as error:
            if isinstance(error.__cause__, HfHubHTTPError):
                raise
        except RemoteEntryNotFoundError:
            return None, is_reachable
    if not Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "snapshots").is_dir():
        raise DistillError(
            f"The Hub cannot be reached, and the local cache has no file of the model repository {name!r}. Run this "
            f"once with a connection; afterwards it works without one. If {name!r} is a folder, write ./{name}."
        )
    return None, False  # transformers reads only the cache as well


def _has_file(name: str, file: str, revision: str | None, is_local: bool) -> bool:
    """Whether a model has a file; the file is not downloaded."""
    if is_local:
        return (Path(name) / file).is_file()
    if isinstance(try_to_load_from_cache(name, file, revision=revision), str):
        return True
    with translate_hub_errors(name, "model", revision, file):
        return HfApi().file_exists(name, file, revision=revision)
