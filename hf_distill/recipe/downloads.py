"""Lists the Hub repositories that a recipe downloads, with commit and size, without downloading them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import httpx2
from huggingface_hub import DatasetInfo, HfApi, ModelInfo, constants, try_to_load_from_cache

from ..core.references import reference_kind
from ..errors import DistillError
from ..filters.contamination import Decontaminate
from ..hub import model_files, parse_uri, translate_hub_errors
from ..hub.model_files import ADAPTER, ADAPTER_WEIGHTS, check_adapter
from .data import Eval, Source
from .models import Student, TeacherSpec
from .schema import Recipe

HubRepo: TypeAlias = tuple[str, str, str | None]
_WEIGHT_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".zip")
_CONFIG_SUFFIXES = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


@dataclass(frozen=True)
class Download:
    """A repository on the Hub that a recipe reads.

    Attributes:
        used_for: All purposes for which the repository is read: student, teacher, data sources, ...
        kind: "model", "tokenizer" (only that of a model) or "dataset".
        repo: Id of the repository.
        revision: Current commit of the requested revision, or the requested revision without a connection.
        size: Bytes of the files that are read; None without a connection.
        missing: Bytes of these files that are not cached. For a dataset these are all bytes, because the cache keeps
            datasets in another format. None without a connection.
        pickled: Whether the weights of a model are pickles, which can run code when they are loaded.
        base: For an adapter, the id of its base model.
    """

    used_for: tuple[str, ...]
    kind: str
    repo: str
    revision: str | None
    size: int | None
    missing: int | None
    pickled: bool = False
    base: str | None = None


def referenced_repos(recipe: Recipe) -> Iterator[tuple[str, str, str, str | None]]:
    """Yield all repositories that a recipe names, as (purpose, name, "model", "tokenizer" or "dataset", revision)."""
    students = {"student": recipe.student} | {f"stage {i}": stage.student for i, stage in enumerate(recipe.stages, 1)}
    teachers = {getattr(spec, "name", "teacher"): spec for spec in recipe.all_teachers}
    specs: dict[str, Student | TeacherSpec] = {**students, **teachers}
    for used_for, spec in specs.items():
        source = spec.source_teacher if isinstance(spec, TeacherSpec) else spec
        if model := source.loaded_model if isinstance(source, TeacherSpec) else source.model:
            yield used_for, model, "model", source.revision
        if isinstance(source, TeacherSpec) and recipe.is_cross_tokenizer and source.tokenizer:
            yield f"tokenizer of {used_for}", source.tokenizer, "tokenizer", None
        if isinstance(path := getattr(spec, "path", None), str):
            yield f"cache of {used_for}", path, "dataset", None
    sources: dict[str, Source | Eval] = {**recipe.data.sources, "eval": recipe.data.eval}
    for name, data in sources.items():
        if data.path:
            yield f"data {name}", data.path, "dataset", None
    filters = recipe.generate.filters if recipe.generate else ()
    tasks = [texts for step in filters if isinstance(step, Decontaminate) for texts in step.data]
    for number, texts in enumerate(tasks, 1):
        yield f"decontamination data {number}", texts.path, "dataset", None


def random_models(recipe: Recipe) -> list[str]:
    """Return the tiny random models that a recipe names. They occur in smoke runs, whose metrics mean nothing."""
    return sorted(
        {name for _, name, kind, _ in referenced_repos(recipe) if kind == "model" and reference_kind(name) == "smoke"}
    )


def smoke_run(recipe: Recipe) -> str | None:
    """Return a sentence that marks a smoke run and names its random models; None for any other recipe."""
    if not (names := random_models(recipe)):
        return None
    return f"This is a smoke run: its models are tiny and were initialized with random weights ({', '.join(names)})."


def downloads(recipe: Recipe) -> list[Download]:
    """Return the Hub repositories that a recipe reads, in the order of the recipe, then the base models of adapters.

    Raises:
        DistillError: A repository does not exist or is not accessible (see `hub.translate_hub_errors`), or the base of
            an adapter is not a model on the Hub.
    """
    uses: dict[HubRepo, list[str]] = {}
    for used_for, name, kind, revision in referenced_repos(recipe):
        if hub_repo := hub_repo_of(name, kind, revision):
            uses.setdefault(hub_repo, []).append(used_for)
    repos = [inspect_repo(tuple(used_for), *hub_repo) for hub_repo, used_for in uses.items()]
    model_repos = {one.repo for one in repos if one.kind == "model"}
    for one in [one for one in repos if one.base]:
        if one.base not in model_repos:
            repos.append(inspect_repo((f"base of {one.repo}",), "model", str(one.base), None))
    return repos


def hub_repo_of(name: str, kind: str, revision: str | None) -> HubRepo | None:
    """Return (kind, repository, revision) of a name that stands for a Hub repository; None for any other name.

    The address of a single file returns None: such a file is small and belongs to the repository of the recipe.
    """
    if reference_kind(name) == "address":
        at = parse_uri(name)
        return None if at.path_in_repo else (kind if kind == "tokenizer" else at.type, at.id, at.revision)
    return (kind, name, revision) if reference_kind(name) == "id" else None


def inspect_repo(used_for: tuple[str, ...], kind: str, repo: str, revision: str | None) -> Download:
    """Return the size, missing bytes and file types of one repository, without downloading its weights."""
    if constants.HF_HUB_OFFLINE:
        return Download(used_for, kind, repo, revision, None, None)
    repo_type = "dataset" if kind == "dataset" else "model"
    with translate_hub_errors(repo, repo_type, revision):
        try:
            info = HfApi().repo_info(repo, repo_type=repo_type, revision=revision, files_metadata=True)
        except httpx2.TransportError:  # without a connection, files are read from the local cache
            return Download(used_for, kind, repo, revision, None, None)
    siblings = info.siblings if isinstance(info, ModelInfo | DatasetInfo) else None
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in siblings or ()}
    read = sizes if kind == "dataset" else _files_to_load(sizes, weights=kind == "model")
    missing = {name: size for name, size in read.items() if not _is_cached(repo, repo_type, name, info.sha)}
    adapter = kind == "model" and ADAPTER in read
    safe = ADAPTER_WEIGHTS in read if adapter else any(name.endswith(".safetensors") for name in read)
    base = check_adapter(model_files(repo, info.sha)) if adapter else None
    size, pickled = sum(read.values()), kind == "model" and not safe
    return Download(used_for, kind, repo, info.sha, size, sum(missing.values()), pickled, base)


def _files_to_load(sizes: dict[str, int], weights: bool) -> dict[str, int]:
    """Return the files that from_pretrained reads: root files, with safetensors weights if there are any.

    Args:
        sizes: Sizes of all files of the repository.
        weights: Whether the weights are read, and not only the config and the tokenizer.
    """
    root = {name: size for name, size in sizes.items() if "/" not in name}
    safe = {name: size for name, size in root.items() if name.endswith(".safetensors")}
    read = safe or {name: size for name, size in root.items() if name.endswith(_WEIGHT_SUFFIXES)}
    return (read if weights else {}) | {name: size for name, size in root.items() if name.endswith(_CONFIG_SUFFIXES)}


def _is_cached(repo: str, kind: str, name: str, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repo, name, revision=commit, repo_type=kind), str)


def check_downloads(repos: list[Download]) -> None:
    """Refuse pickled weights, for an untrusted recipe.

    Raises:
        DistillError: Some models have pickled weights.
    """
    pickled = [one.repo for one in repos if one.pickled]
    if pickled:
        raise DistillError(
            f"{', '.join(pickled)}: the weights are pickled, and loading a pickle can run code that its author put "
            "there. Choose models with safetensors weights, as key=value on the command line."
        )
