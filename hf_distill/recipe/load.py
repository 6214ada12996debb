"""From a path or a packaged name to a validated recipe."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ..errors import DistillError, did_you_mean, noted
from ..zero import check_teacher_config, read_deepspeed
from .schema import Recipe, packaged_schema
from .smoke import smoke_values
from .stages import planned_values, stage_values


def list_recipes() -> dict[str, str]:
    """Packaged recipes: name -> the first line of its header."""
    found = {f.name.removesuffix(".yaml"): f for f in files("hf_distill.recipes").iterdir() if f.name.endswith(".yaml")}
    return {name: found[name].read_text().partition("\n")[0].lstrip("# ") for name in sorted(found)}


def recipe_text(reference: str) -> str:
    """The YAML of a recipe.

    Args:
        reference: a path to a .yaml file, or the name of a packaged recipe.

    Raises:
        DistillError: there is no such file or name.
    """
    path = Path(reference)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise DistillError(f"There is no recipe file {reference!r} (looked in {Path.cwd()}).")
        return path.read_text()
    names = list_recipes()
    if reference not in names:
        raise DistillError(
            f"There is no packaged recipe {reference!r}{did_you_mean(reference, names)}. A file's name ends in .yaml."
        )
    return files("hf_distill.recipes").joinpath(f"{reference}.yaml").read_text()


def load_recipe(reference: str, overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and validate a recipe.

    Args:
        reference: see `recipe_text`.
        overrides: `key=value` with dots in the key, such as `train.max_steps=20`; the value is YAML.
        smoke: the same recipe with tiny random models and a few steps; overrides beat it.

    Raises:
        DistillError: not found, not YAML, or not a recipe; every problem is listed with its place.
    """
    folder = Path(reference).parent
    try:
        values = yaml.safe_load(recipe_text(reference))
        if not isinstance(values, dict):
            raise DistillError(f"{reference} is not a mapping of student, teacher, data, distill, train.")
        if smoke:
            values = smoke_values(validate(values, folder).model_dump(exclude_unset=True))
        for override in overrides:
            _set(values, override)
    except yaml.YAMLError as error:
        raise DistillError(f"{reference} is not YAML: {error}") from None
    return validate(values, folder)


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
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise DistillError(f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in the recipe:\n{lines}")
    return recipe


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
    values[last] = yaml.safe_load(text)


def _problem(item: Any) -> str:
    place = ".".join(str(part) for part in item["loc"]) or "recipe"
    if item["type"] == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(str(item['loc'][-1]), _keys_at(item['loc'][:-1]))}"
    if item["type"] == "missing":
        return f"{place}: missing"
    message = item["msg"].removeprefix("Value error, ")
    given = item["input"]
    return f"{place}: {message}" + ("" if isinstance(given, dict | list) else f" (given: {given!r})")


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
