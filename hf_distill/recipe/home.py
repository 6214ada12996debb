"""Names that a recipe from the Hub gives to files beside it: they mean files of the same commit, and no others."""

import json
from importlib.resources import files
from pathlib import PurePosixPath
from typing import Any

from ..errors import DistillError, noted, tell
from ..names import ADDRESS, FILES, PACKAGE
from .reading import LIMIT


def at_home(values: dict[str, Any], origin: str) -> dict[str, Any]:
    """A recipe's values: DeepSpeed files as their content, data files by their address at the recipe's commit.

    Args:
        values: of the YAML, of whatever types.
        origin: hf:// address of the recipe, at a commit.

    Raises:
        DistillError: a name leads out of the repository, or no such file is there; all of them at once.
    """
    problems: list[str] = []
    values = _with_deepspeed(values, origin, problems)
    data = values.get("data")
    if isinstance(data, dict):
        values = values | {"data": {name: _with_path(part, origin, problems) for name, part in data.items()}}
    tell(problems)
    return values


def _with_deepspeed(value: Any, origin: str, problems: list[str]) -> Any:
    if isinstance(value, list):
        return [_with_deepspeed(item, origin, problems) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _with_deepspeed(item, origin, problems) for key, item in value.items()}
    if isinstance(name := found.get("deepspeed"), str):
        with noted(problems):
            found["deepspeed"] = _content(name, origin)
    return found


def _content(name: str, origin: str) -> Any:
    """Of a packaged DeepSpeed config, or of one beside the recipe."""
    from ..hub import address, beside, fetch

    packaged = {f.name: f for f in files("hf_distill.recipes").joinpath("deepspeed").iterdir()}
    text = (
        packaged[name].read_text() if name in packaged else fetch(beside(address(origin), name), LIMIT).path.read_text()
    )
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DistillError(f"{name} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise DistillError(f"{name} holds {type(content).__name__}, no mapping")
    return content


def _with_path(part: Any, origin: str, problems: list[str]) -> Any:
    from ..hub import address, beside, written

    if not isinstance(part, dict) or not isinstance(path := part.get("path"), str):
        return part
    if path.startswith((ADDRESS, PACKAGE)) or PurePosixPath(path).suffix not in FILES:
        return part
    with noted(problems):
        return part | {"path": written(beside(address(origin), path))}
    return part
