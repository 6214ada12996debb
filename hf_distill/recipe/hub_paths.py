"""Relative paths in a recipe from the Hub: they refer to files of the same repository at the same commit."""

import copy
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import PurePosixPath

from ..core.json_types import JSON, JSONObject
from ..core.references import DATASET_BUILDERS, HUB_PREFIX, PACKAGE_PREFIX
from ..errors import DistillError, collect_errors, raise_if_any
from .filters import evaluation_data
from .resolve import read_text
from .safe_yaml import MAX_BYTES

# Relative paths of JSON files without hidden folders or characters that a shell expands.
_RELATIVE_JSON = re.compile(r"(?:\.\./)*(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*\.json")


def pin_relative_paths(values: JSONObject, origin: str) -> JSONObject:
    """Replace DeepSpeed files by their content, and data files by their address at the commit of the recipe.

    Args:
        values: Values as read from YAML, not yet validated.
        origin: hf:// address of the recipe at a commit.

    Returns:
        A copy of the values with these replacements.

    Raises:
        DistillError: Paths lead out of the repository, or files do not exist. The message lists all of them.
    """
    problems: list[str] = []
    values = copy.deepcopy(values)
    for section, name in deepspeed_sections(values):
        with collect_errors(problems):
            section["deepspeed"] = deepspeed_content(name, origin)
    data = values.get("data")
    if isinstance(data, dict):
        values = values | {"data": {name: _with_path(part, origin, problems) for name, part in data.items()}}
    for _, entry in evaluation_data(values):
        pinned = _with_path(entry, origin, problems)
        assert isinstance(pinned, dict)
        entry.update(pinned)
    raise_if_any(problems)
    return values


def deepspeed_sections(values: JSON) -> Iterator[tuple[JSONObject, str]]:
    """Yield the sections whose key `deepspeed` names a file, and this name: `train` and teachers, also of stages.

    Args:
        values: Values as read from YAML, not yet validated.
    """
    if not isinstance(values, dict):
        return
    stages, teachers = (part if isinstance(part := values.get(name), list) else [] for name in ("stages", "teachers"))
    owners = [values, *stages]
    sections = [owner.get(name) for owner in owners if isinstance(owner, dict) for name in ("train", "teacher")]
    sections += teachers
    sections += [section.get("source") for section in sections if isinstance(section, dict)]
    for section in sections:
        if isinstance(section, dict) and isinstance(name := section.get("deepspeed"), str):
            yield section, name


def is_packaged(name: str) -> bool:
    """Whether a name is that of a packaged DeepSpeed config."""
    return any(file.name == name for file in files("hf_distill.recipes").joinpath("deepspeed").iterdir())


def deepspeed_content(name: str, origin: str) -> JSONObject:
    """Read a packaged DeepSpeed config, or one in the repository of a recipe.

    Args:
        name: Name or path as given in the recipe.
        origin: hf:// address of the recipe at a commit.

    Raises:
        DistillError: The path is not allowed, the file does not exist, or it does not hold a JSON object.
    """
    from ..hub import fetch, parse_uri, sibling_uri

    if is_packaged(name):
        text = files("hf_distill.recipes").joinpath("deepspeed", name).read_text()
    else:
        at = sibling_uri(parse_uri(origin), name)
        if not _RELATIVE_JSON.fullmatch(name):
            raise DistillError(
                f"{name!r} cannot be a DeepSpeed config: give the path of a .json file that is not in a hidden folder"
            )
        text = read_text(fetch(at, MAX_BYTES).path, name)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DistillError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DistillError(f"{name} holds a {type(content).__name__}; a DeepSpeed config must be a JSON object")
    return content


def _with_path(part: JSON, origin: str, problems: list[str]) -> JSON:
    from ..hub import format_uri, parse_uri, sibling_uri

    if not isinstance(part, dict) or not isinstance(path := part.get("path"), str):
        return part
    if path.startswith((HUB_PREFIX, PACKAGE_PREFIX)) or PurePosixPath(path).suffix not in DATASET_BUILDERS:
        return part
    with collect_errors(problems):
        return part | {"path": format_uri(sibling_uri(parse_uri(origin), path))}
    return part
