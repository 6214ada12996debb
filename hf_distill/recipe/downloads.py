"""What a recipe downloads: which repositories, at which commit, how many bytes; nothing is downloaded to know it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from huggingface_hub import HfApi, constants, try_to_load_from_cache

from ..core.references import reference_kind
from ..errors import DistillError
from ..hub import model_files, parse_uri, translate_hub_errors
from ..hub.model_files import ADAPTER, ADAPTER_WEIGHTS, check_adapter
from .schema import Recipe

Place: TypeAlias = tuple[str, str, str | None]
_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".zip")
_BESIDE = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".py")


@dataclass(frozen=True)
class Download:
    """A repository that a recipe reads.

    what:     student, teacher, a source of data, ...: all for which it is read
    kind:     "model" or "dataset"
    revision: commit that is read now; what was asked for where the Hub is out of reach
    size:     bytes of the files that are read; None where the Hub is out of reach
    missing:  bytes of them that are not in the cache; of a data set as if none were, for it is kept converted
    pickled:  the model's weights are pickles, of which reading is running
    base:     of an adapter: the model that it is for
    """

    what: tuple[str, ...]
    kind: str
    repo: str
    revision: str | None
    size: int | None
    missing: int | None
    pickled: bool = False
    base: str | None = None


def referenced_repos(recipe: Recipe) -> Iterator[tuple[str, str, str, str | None]]:
    """(what for, name, "model" or "dataset", revision) of all models and data that a recipe names, as it names them."""
    students = {"student": recipe.student} | {f"stage {i}": stage.student for i, stage in enumerate(recipe.stages, 1)}
    teachers = {getattr(spec, "name", "teacher"): spec for spec in recipe.all_teachers}
    specs: dict[str, Any] = students | teachers
    for what, spec in specs.items():
        spoken = getattr(spec, "speaker", spec)
        if spoken.model:
            yield what, spoken.model, "model", spoken.revision
        if isinstance(path := getattr(spec, "path", None), str):
            yield f"cache of {what}", path, "dataset", None
    sources: dict[str, Any] = {**recipe.data.sources, "eval": recipe.data.eval}
    for name, source in sources.items():
        if source.path:
            yield f"data {name}", source.path, "dataset", None


def random_models(recipe: Recipe) -> list[str]:
    """The tiny random models that a recipe names, as a smoke run does: such a run's figures mean nothing."""
    return sorted(
        {name for _, name, kind, _ in referenced_repos(recipe) if kind == "model" and reference_kind(name) == "smoke"}
    )


def smoke_run(recipe: Recipe) -> str | None:
    """A sentence that says that a recipe is a smoke run, with its random models; None: it is none."""
    if not (names := random_models(recipe)):
        return None
    return f"This is a smoke run: its models are tiny and began with random weights ({', '.join(names)})."


def downloads(recipe: Recipe) -> list[Download]:
    """The repositories of the Hub that a recipe reads, in the order in which it names them, bases of adapters too.

    Raises:
        DistillError: one is not there, private or gated; an adapter's base is no model on the Hub; see `hub.asking`.
    """
    places: dict[Place, list[str]] = {}
    for what, name, kind, revision in referenced_repos(recipe):
        if place := hub_repo_of(name, kind, revision):
            places.setdefault(place, []).append(what)
    found = [inspect_repo(tuple(what), *place) for place, what in places.items()]
    known = {one.repo for one in found if one.kind == "model"}
    for one in [one for one in found if one.base]:
        if one.base not in known:
            found.append(inspect_repo((f"base of {one.repo}",), "model", str(one.base), None))
    return found


def hub_repo_of(name: str, kind: str, revision: str | None) -> Place | None:
    """(kind, repository, revision) of a name that is read as a whole from the Hub; None: it is read elsewhere.

    A single file's address is none: it is one of the recipe's own repository, small beside the rest.
    """
    if reference_kind(name) == "address":
        at = parse_uri(name)
        return None if at.path_in_repo else (at.type, at.id, at.revision)
    return (kind, name, revision) if reference_kind(name) == "id" else None


def inspect_repo(what: tuple[str, ...], kind: str, repo: str, revision: str | None) -> Download:
    """Size, missing bytes and file types of one repository, without downloading its weights."""
    if constants.HF_HUB_OFFLINE:
        return Download(what, kind, repo, revision, None, None)
    with translate_hub_errors(repo, kind, revision):
        info: Any = HfApi().repo_info(repo, repo_type=kind, revision=revision, files_metadata=True)
    sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or ()}
    read = _read_of_model(sizes) if kind == "model" else sizes
    missing = {name: size for name, size in read.items() if not _cached(repo, kind, name, info.sha)}
    adapter = kind == "model" and ADAPTER in read
    safe = ADAPTER_WEIGHTS in read if adapter else any(name.endswith(".safetensors") for name in read)
    base = check_adapter(model_files(repo, info.sha)) if adapter else None
    size, pickled = sum(read.values()), kind == "model" and not safe
    return Download(what, kind, repo, info.sha, size, sum(missing.values()), pickled, base)


def _read_of_model(sizes: dict[str, int]) -> dict[str, int]:
    """What from_pretrained reads: files of the root; safetensors, or what there is instead of them."""
    root = {name: size for name, size in sizes.items() if "/" not in name}
    weights = {name: size for name, size in root.items() if name.endswith(".safetensors")}
    weights = weights or {name: size for name, size in root.items() if name.endswith(_WEIGHTS)}
    return weights | {name: size for name, size in root.items() if name.endswith(_BESIDE)}


def _cached(repo: str, kind: str, name: str, commit: str | None) -> bool:
    return isinstance(try_to_load_from_cache(repo, name, revision=commit, repo_type=kind), str)


def check_downloads(found: list[Download]) -> None:
    """Refuse pickled weights, for a recipe whose author is not its user.

    Raises:
        DistillError: which models, and what to do.
    """
    pickled = [one.repo for one in found if one.pickled]
    if pickled:
        raise DistillError(
            f"{', '.join(pickled)}: the weights are pickled, and reading a pickle can run what a stranger put into it. "
            "Name models with safetensors, as key=value on the command line."
        )
