"""Names that a recipe from the Hub gives to files beside it: they mean files of the same commit, and no others."""

import copy
import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from ..core.references import DATASET_BUILDERS, HUB_PREFIX, PACKAGE_PREFIX
from ..errors import DistillError, collect_errors, raise_if_any
from .resolve import read_text
from .safe_yaml import LIMIT

# A file that a recipe may name beside itself: no hidden folder, no executable suffix, no name that a shell expands.
_BESIDE = re.compile(r"(?:\.\./)*(?:[A-Za-z0-9_][\w.-]*/)*[A-Za-z0-9_][\w.-]*\.json")


def pin_relative_paths(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """A recipe's values: DeepSpeed files as their content, data files by their address at the recipe's commit.

    Args:
        values: of the YAML, of whatever types.
        origin: hf:// address of the recipe, at a commit.

    Raises:
        DistillError: a name leads out of the repository, or no such file is there; all of them at once.
    """
    problems: list[str] = []
    values = copy.deepcopy(values)
    for part in deepspeed_parts(values):
        with collect_errors(problems):
            part["deepspeed"] = content_of(part["deepspeed"], origin)
    data = values.get("data")
    if isinstance(data, dict):
        values = values | {"data": {name: _with_path(part, origin, problems) for name, part in data.items()}}
    raise_if_any(problems)
    return values


def deepspeed_parts(values: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The sections of a recipe whose field `deepspeed` names a file: of `train`, teachers and stages, and no others.

    Args:
        values: of the YAML, of whatever types.
    """
    stages, teachers = (values.get(name) for name in ("stages", "teachers"))
    stages, teachers = (part if isinstance(part, list) else [] for part in (stages, teachers))
    owners = [values, *stages]
    sections = [owner.get(name) for owner in owners if isinstance(owner, dict) for name in ("train", "teacher")]
    sections += teachers
    sections += [section.get("source") for section in sections if isinstance(section, dict)]
    yield from (s for s in sections if isinstance(s, dict) and isinstance(s.get("deepspeed"), str))


def is_packaged(name: str) -> bool:
    """Whether a name is that of a DeepSpeed config of this package."""
    return any(file.name == name for file in files("hf_distill.recipes").joinpath("deepspeed").iterdir())


def content_of(name: str, origin: str) -> dict[str, Any]:
    """The content of a packaged DeepSpeed config, or of one beside a recipe.

    Args:
        name: as the recipe gives it.
        origin: hf:// address of the recipe, at a commit.

    Raises:
        DistillError: the name is not allowed, there is no such file, or it holds no JSON object.
    """
    from ..hub import fetch, parse_uri, sibling_uri

    if is_packaged(name):
        text = files("hf_distill.recipes").joinpath("deepspeed", name).read_text()
    else:
        at = sibling_uri(parse_uri(origin), name)
        if not _BESIDE.fullmatch(name):
            raise DistillError(f"{name!r} is no DeepSpeed config: give a .json file that is in no hidden folder")
        text = read_text(fetch(at, LIMIT).path, name)
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DistillError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DistillError(f"{name} holds {type(content).__name__}, no mapping")
    return content


def _with_path(part: Any, origin: str, problems: list[str]) -> Any:
    from ..hub import format_uri, parse_uri, sibling_uri

    if not isinstance(part, dict) or not isinstance(path := part.get("path"), str):
        return part
    if path.startswith((HUB_PREFIX, PACKAGE_PREFIX)) or PurePosixPath(path).suffix not in DATASET_BUILDERS:
        return part
    with collect_errors(problems):
        return part | {"path": format_uri(sibling_uri(parse_uri(origin), path))}
    return part
