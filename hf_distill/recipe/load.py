"""From a reference to a validated recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import DistillError, did_you_mean, noted
from ..version import __version__
from ..zero import check_teacher_config, read_deepspeed
from .home import at_home
from .reading import read_yaml
from .references import Found, find_recipe, packaged_text
from .schema import Recipe
from .smoke import smoke_values
from .stages import planned_values, stage_values
from .terms import packaged_schema
from .trust import untrusted


def load_recipe(reference: str, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and validate a recipe.

    Args:
        reference: see `find_recipe`.
        overrides: `key=value` with dots in the key, such as `train.max_steps=20`; the value is YAML.
        smoke: the same recipe with tiny random models and a few steps; overrides beat it.

    Raises:
        DistillError: not found, not YAML, not a recipe, one for a newer hf-distill, or one from the Hub that says what
            a stranger's may not; every problem is listed with its place.
    """
    found = find_recipe(reference)
    values = whole_values(found, reference)
    if smoke:
        values = smoke_values(validate(values, found.folder).model_dump(exclude_unset=True))
    for override in overrides:
        _set(values, override)
    return validate(values, found.folder)


def whole_values(found: Found, reference: str) -> dict[str, Any]:
    """A recipe's values with what it extends; of one from the Hub, checked and with the files beside it in place.

    Raises:
        DistillError: see `load_recipe`.
    """
    values = read_yaml(found.text, reference)
    if not isinstance(values, dict):
        raise DistillError(f"{reference} is not a mapping of student, teacher, data, distill, train.")
    _check_version(values.get("requires"), reference)
    values = _extended(values, reference)
    if found.origin is None:
        return values
    values = at_home(values, found.origin)
    if problems := untrusted(validate(values, found.folder)):
        _tell(problems, f"in the recipe, which is a stranger's ({found.origin})")
    return values | {"origin": found.origin}


def _check_version(requires: Any, reference: str) -> None:
    if requires is None:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        wanted = SpecifierSet(str(requires))
    except InvalidSpecifier:
        raise DistillError(f"requires: {requires!r} is no range of versions: write it as '>=0.2'.") from None
    if not wanted.contains(__version__, prereleases=True):
        raise DistillError(
            f"{reference} requires hf-distill {requires}, and this is {__version__}: pip install --upgrade hf-distill"
        )


def _extended(values: dict[str, Any], reference: str) -> dict[str, Any]:
    """A packaged recipe's values with these in their place: mappings key by key, anything else whole."""
    name = values.get("extends")
    if name is None:
        return values
    if not isinstance(name, str):
        raise DistillError(f"{reference}: extends takes the name of a packaged recipe; got {name!r}.")
    base = read_yaml(packaged_text(name), name)
    return _merged(base, {key: value for key, value in values.items() if key != "extends"})


def _merged(base: Any, own: Any) -> Any:
    if isinstance(base, dict) and isinstance(own, dict):
        return base | {key: _merged(base.get(key), value) for key, value in own.items()}
    return own


def validate(values: dict[str, Any], folder: Path = Path()) -> Recipe:
    """A recipe from plain values.

    Args:
        values: of the YAML.
        folder: where the names of DeepSpeed files start.

    Raises:
        DistillError: every problem, a line each: its place, what is wrong, what is near.
    """
    problems: list[str] = []
    for part in ("teacher", "train"):
        if isinstance(given := values.get(part), dict) and isinstance(given.get("deepspeed"), str | dict):
            try:
                values = {**values, part: {**given, "deepspeed": _deepspeed(given["deepspeed"], part, folder)}}
            except DistillError as error:
                problems.append(f"{part}.deepspeed: {error}")
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        problems += [_problem(item) for item in error.errors()]
    if not problems:
        for number in range(1, len(recipe.stages) + 1):
            with noted(problems):
                validate(stage_values(recipe.model_dump(exclude_none=True, exclude_unset=True), number), folder)
    if problems:
        _tell(problems, "in the recipe")
    return recipe


def _tell(problems: Sequence[str], where: str) -> None:
    lines = "\n".join(f"  {problem}" for problem in problems)
    raise DistillError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} {where}:\n{lines}")


def parts_to_plan(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe, as ""; of a chain the recipe of each stage, as far as it is known before the chain runs."""
    if not recipe.stages:
        return {"": recipe}
    values = planned_values(recipe.model_dump(exclude_none=True, exclude_unset=True))
    return {name: validate(part) for name, part in values.items()}


def _deepspeed(config: str | dict[str, Any], part: str, folder: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON, in the place of its name: a run's recipe.yaml says all of it."""
    content = read_deepspeed(config, folder)
    if part == "teacher":
        check_teacher_config(content)
    return content


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise DistillError(f"{override!r} is not an override: write key=value, such as train.max_steps=20.")
    *parents, last = key.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise DistillError(f"{override!r}: {name!r} is not a mapping, so it has no {last!r}.")
    values[last] = read_yaml(text, override)


def _problem(item: Any) -> str:
    place = ".".join(part if str(part).isprintable() else repr(part) for part in map(str, item["loc"])) or "recipe"
    if item["type"] == "extra_forbidden" and item["loc"][-1] == "trust_remote_code":
        return f"{place}: no recipe says that; who has read the code adds --trust-remote-code to `hf-distill run`"
    if item["type"] == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(str(item['loc'][-1]), _keys_at(item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{place}: missing"
    given = item["input"]
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        return f"{place}: must be a mapping, key: value; got {_short(given)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{place}: {message}" + ("" if isinstance(given, dict | list) else f" (given: {_short(given)})")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def _keys_at(loc: tuple) -> list[str]:
    schema = packaged_schema()
    node = schema
    for part in loc:
        known = node.get("properties", {})
        node = node["items"] if isinstance(part, int) else known.get(part) or node["additionalProperties"]
        for option in [node, *node.get("anyOf", [])]:
            if "$ref" in option:
                node = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
    return list(node.get("properties", {}))
