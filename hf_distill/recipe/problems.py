"""Problems of a recipe as lines: the place, what is wrong, what is near."""

from collections.abc import Sequence
from typing import Any

from ..errors import DistillError, did_you_mean, nearest
from .losses import packaged_schema
from .plain_yaml import printable, short, short_text

_LONGEST = 800  # characters of a problem that are shown


class Problems(ValueError):
    """Several problems that a validator found in one model, a line each."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = list(lines)


def raise_problems(problems: Sequence[str], where: str) -> None:
    """Raise a DistillError of all problems, a line each."""
    shown = [problem if len(problem) <= _LONGEST else f"{problem[:_LONGEST]}..." for problem in problems]
    lines = "\n".join(f"  {problem}" for problem in shown)
    raise DistillError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} {where}:\n{lines}")


def place_of(location: Sequence[Any]) -> str:
    """A location in a recipe as its keys, with dots between them."""
    return printable(".".join(map(short_text, location))) or "recipe"


def lines_of(item: Any) -> list[str]:
    """The lines of one of pydantic's errors."""
    location, kind, given = item["loc"], item["type"], item["input"]
    if location[-1:] == ("int",) and kind.startswith("int_"):
        return []  # one half of "a whole number, or a number"; the other half names it
    location = location[:-1] if location[-1:] == ("float",) else location
    place = place_of(location)
    if kind == "extra_forbidden" and location[-1] == "trust_remote_code":
        return [f"{place}: no recipe says that; who has read the code adds --trust-remote-code to `hf-distill run`"]
    if kind == "extra_forbidden":
        return [f"{place}: unknown key{did_you_mean(short_text(location[-1]), keys_at(location[:-1]))}"]
    if kind == "model_type" and is_unknown_source(location):
        known = did_you_mean(short_text(location[-1]), keys_at(location[:-1]))
        return [f"{place}: unknown key{known} (a further source is a mapping with a path)"]
    if kind == "missing":
        return [f"{place}: missing"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{place}: must be a mapping, key: value; got {short(given)}"]
    error = item.get("ctx", {}).get("error")
    if isinstance(error, Problems):
        return [f"{place}: {line}" for line in error.lines]
    message = item["msg"].removeprefix("Value error, ")
    return [f"{place}: {message}" + ("" if isinstance(given, dict | list) else f" (given: {short(given)})")]


def is_unknown_source(location: Sequence[Any]) -> bool:
    """Whether a location is a key of `data` that is neither one of its own nor a source."""
    return len(location) == 2 and location[0] == "data" and location[1] not in keys_at(location[:1])


def keys_at(location: Sequence[Any]) -> list[str]:
    """The keys that a mapping of a recipe knows."""
    schema = packaged_schema()
    node = schema
    for part in location:
        known = node.get("properties", {})
        node = node.get("items", {}) if isinstance(part, int) else known.get(part) or _others(node)
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                node = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
    return list(node.get("properties", {}))


def _others(node: dict[str, Any]) -> dict[str, Any]:
    others = node.get("additionalProperties")
    return others if isinstance(others, dict) else {}


def without_wrong_values(values: Any, errors: Sequence[Any]) -> set[str]:
    """Take the values that errors are about out of a recipe; returns their keys. A whole section stays."""
    names = set()
    for item in errors:
        owner, last = None, None
        node = values
        for part in item["loc"]:  # behind the value's own place stand names of types
            if not (isinstance(node, dict) and part in node) and not (
                isinstance(node, list) and isinstance(part, int) and part < len(node)
            ):
                break
            owner, last, node = node, part, node[part]
        if isinstance(owner, dict) and owner is not values and item["type"] != "missing":
            del owner[last]
            names.add(str(last))
    return names


def with_known_keys(values: Any, errors: Sequence[Any]) -> tuple[Any, bool]:
    """The values without their unknown keys, so that what these hid is found too; and whether there were any.

    A key that is near a known one which is not given takes that one's name.
    """
    changed = False
    for item in errors:
        location = item["loc"]
        is_unknown = item["type"] == "extra_forbidden" or (item["type"] == "model_type" and is_unknown_source(location))
        if not is_unknown or not location:
            continue
        owner = values
        for part in location[:-1]:
            owner = owner[part] if isinstance(owner, list) or part in owner else None
            if owner is None:
                break
        if not isinstance(owner, dict) or location[-1] not in owner:
            continue
        value, near = owner.pop(location[-1]), nearest(str(location[-1]), keys_at(location[:-1]))
        if near and near not in owner:
            owner[near] = value
        changed = True
    return values, changed
