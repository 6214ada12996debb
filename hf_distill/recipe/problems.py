"""Turns validation errors of a recipe into one readable line each: the dotted key and what is wrong."""

import re
from collections.abc import Sequence
from typing import Any, cast

from pydantic_core import ErrorDetails

from ..core.json_types import JSONObject
from ..errors import DistillError, did_you_mean, nearest
from .losses import JSONSchema, packaged_schema
from .plain_yaml import Location, printable, short, short_text

_MAX_CHARACTERS = 800  # characters of a problem that are shown
# Names of types that pydantic inserts into the location of a value for which several types are allowed
_TYPE_NAME = re.compile(r"(constrained-)?(int|float|str|bool)|(literal|list|dict|tuple|nullable|function-\w+)\[.*\]")


class Problems(ValueError):
    """Several problems that one validator found; each is shown on a line of its own."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = list(lines)


def raise_problems(problems: Sequence[str], where: str) -> None:
    """Raise a DistillError that lists all problems, one on each line."""
    shown = [problem if len(problem) <= _MAX_CHARACTERS else f"{problem[:_MAX_CHARACTERS]}..." for problem in problems]
    lines = "\n".join(f"  {problem}" for problem in shown)
    raise DistillError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} {where}:\n{lines}")


def dotted_key(location: Location) -> str:
    """Return a location in a recipe as a dotted key, such as train.max_steps."""
    return printable(".".join(map(short_text, location))) or "recipe"


def problem_lines(errors: Sequence[ErrorDetails], values: JSONObject) -> list[str]:
    """Return the lines that describe the errors of a validation of `values`.

    pydantic reports a value for which several types are allowed (`int | str`) once for each of them. It gets one line,
    or only the lines about what is inside the value if it has one of these types.
    """
    locations = [_without_types(item["loc"], values) for item in errors]
    unions = [_union_of(item["loc"], values) for item in errors]
    entered = {union for union, location in zip(unions, locations, strict=True) if union not in (None, location)}
    lines: list[str] = []
    for i, (item, location, union) in enumerate(zip(errors, locations, unions, strict=True)):
        if union is None or union != location:
            lines += _error_lines(item | {"loc": location})
        elif union not in entered and unions.index(union) == i:
            items = [other for other, same in zip(errors, unions, strict=True) if same == union]
            lines += _union_lines(location, items)
    return lines


def _without_types(location: Location, values: JSONObject) -> Location:
    """Return a location without the names of types that pydantic inserts."""
    return tuple(part for part, is_type in zip(location, _are_type_names(location, values), strict=True) if not is_type)


def _union_of(location: Location, values: JSONObject) -> Location | None:
    """Return the location of the innermost value around a location for which several types are allowed; None: none."""
    last = max((i for i, is_type in enumerate(_are_type_names(location, values)) if is_type), default=None)
    return None if last is None else _without_types(location[:last], values)


def _are_type_names(location: Location, values: JSONObject) -> list[bool]:
    """Return for each part of a location whether it is the name of a type, and no key of the recipe such as `float`."""
    node: object = values
    are_types = []
    for part in location:
        is_key = isinstance(node, dict) and part in node
        if is_key or (isinstance(node, list) and isinstance(part, int) and part < len(node)):
            node = cast(Any, node)[part]
        are_types.append(not is_key and isinstance(part, str) and _TYPE_NAME.fullmatch(part) is not None)
    return are_types


def _union_lines(location: Location, errors: Sequence[ErrorDetails]) -> list[str]:
    """Return the line about a value that has none of the types that are allowed for it."""
    if any(item["loc"][-1] == "float" for item in errors):  # it includes the integers
        errors = [item for item in errors if item["loc"][-1] != "int"]
    if len(errors) == 1 or any(item["type"] == "value_error" for item in errors):
        return [line for item in errors for line in _error_lines(item | {"loc": location})]
    types = []
    for item in errors:
        if item["type"] in ("model_type", "dict_type"):
            types.append("a mapping (key: value)")
        else:
            types.append(re.split(", (?:unable|got) ", item["msg"].removeprefix("Input should be "))[0])
    return [f"{dotted_key(location)}: must be {' or '.join(dict.fromkeys(types))} (given: {short(errors[0]['input'])})"]


def _error_lines(item: ErrorDetails) -> list[str]:
    """Return the lines that describe one error of pydantic."""
    location, kind, value = item["loc"], item["type"], item["input"]
    key = dotted_key(location)
    if kind == "extra_forbidden" and location[-1] == "trust_remote_code":
        return [
            f"{key}: not allowed in a recipe. Read the code of the model, and if you trust it, add "
            "--trust-remote-code to `hf-distill run`"
        ]
    if kind == "extra_forbidden":
        name, colon, rest = str(location[-1]).partition(":")
        if colon and value is None:  # YAML reads {kind:cached} as the key "kind:cached" without a value
            return [f"{key}: unknown key (YAML needs a space after the colon: {short_text(name)}: {short_text(rest)})"]
        return [f"{key}: unknown key{did_you_mean(short_text(location[-1]), keys_at(location[:-1]))}"]
    if kind == "model_type" and is_unknown_source(location):
        suggestion = did_you_mean(short_text(location[-1]), keys_at(location[:-1]))
        return [f"{key}: unknown key{suggestion} (a further data source is a mapping with a path)"]
    if kind == "missing":
        return [f"{key}: required key is missing"]
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        return [f"{key}: must be a mapping (key: value); got {short(value)}"]
    if kind == "union_tag_invalid":
        name = item["ctx"]["tag"]
        return [f"{key}.name: unknown name {short(name)}{did_you_mean(name, _names_at(location))}"]
    if kind == "union_tag_not_found":
        return [
            f"{key}: must be one of {', '.join(_names_at(location))}, or {{name: ..., option: ...}}; got {short(value)}"
        ]
    error = item.get("ctx", {}).get("error")
    if isinstance(error, Problems):
        return [f"{key}: {line}" for line in error.lines]
    message = item["msg"].removeprefix("Value error, ")
    return [f"{key}: {message}" + ("" if isinstance(value, dict | list) else f" (given: {short(value)})")]


def is_unknown_source(location: Location) -> bool:
    """Whether a location is a key of `data` that is neither a known key nor a data source."""
    return len(location) == 2 and location[0] == "data" and location[1] not in keys_at(location[:1])


def keys_at(location: Location) -> list[str]:
    """Return the known keys of the section at a location."""
    return list(_schema_at(location).get("properties", {}))


def _names_at(location: Location) -> list[str]:
    """Return the names that select what may stand at a location, such as the names of filters."""
    return list(_mapping_of(_schema_at(location)))


def _schema_at(location: Location) -> JSONSchema:
    schema = packaged_schema()
    node = schema
    for part in location:
        if part in (mapping := _mapping_of(node)):
            node = {"$ref": mapping[str(part)]}  # pydantic appends the name to the location of what it selects
        else:
            properties = node.get("properties", {})
            node = node.get("items", {}) if isinstance(part, int) else properties.get(part) or _others(node)
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                node = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
    return node


def _without_names(location: Location) -> Location:
    """Return the location of a value in a recipe, without the names that pydantic inserts; see `_schema_at`."""
    parts = enumerate(location)
    return tuple(part for i, part in parts if part not in _mapping_of(_schema_at(location[:i])))


def _mapping_of(node: JSONSchema) -> dict[str, str]:
    """Return name -> reference to a definition, for values whose key `name` selects their keys."""
    options = [node, *node.get("anyOf", [])]
    return next((option["discriminator"]["mapping"] for option in options if "discriminator" in option), {})


def _others(node: JSONSchema) -> JSONSchema:
    others = node.get("additionalProperties")
    return others if isinstance(others, dict) else {}


def remove_wrong_values(values: JSONObject, errors: Sequence[ErrorDetails]) -> set[str]:
    """Remove the values that the errors are about from a recipe, but no top-level section; return their keys."""
    names = set()
    for item in errors:
        owner, last = None, None
        node: object = values
        for part in _without_names(item["loc"]):  # after the location of the value, pydantic appends names of types
            if isinstance(node, dict) and part in node:
                owner, last, node = node, part, node[part]
            elif isinstance(node, list) and isinstance(part, int) and part < len(node):
                owner, node = None, node[part]
            else:
                break
        if owner is not None and owner is not values and item["type"] != "missing":
            del owner[last]
            names.add(str(last))
    return names


def remove_unknown_keys(values: JSONObject, errors: Sequence[ErrorDetails]) -> bool:
    """Remove the unknown keys, and return whether there were any, to find the problems that they hide.

    An unknown key that is similar to a known key which is not set is renamed to it.
    """
    changed = False
    for item in errors:
        location = item["loc"]
        is_unknown = item["type"] == "extra_forbidden" or (item["type"] == "model_type" and is_unknown_source(location))
        if not is_unknown or not location:
            continue
        owner: object = values
        for part in _without_names(location)[:-1]:
            if isinstance(owner, list) and isinstance(part, int):
                owner = owner[part]
            else:
                owner = owner.get(part) if isinstance(owner, dict) else None
        if not isinstance(owner, dict) or location[-1] not in owner:
            continue
        value, near = owner.pop(location[-1]), nearest(str(location[-1]), keys_at(location[:-1]))
        if near and near not in owner:
            owner[near] = value
        changed = True
    return changed
