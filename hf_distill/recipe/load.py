"""Loads a recipe by its reference, applies overrides, and validates it."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import cast

from pydantic import ValidationError

from ..core.deepspeed_config import check_teacher_config, read_deepspeed
from ..core.json_types import JSON, JSONObject
from ..errors import DistillError, collect_errors
from ..version import __version__
from .hub_paths import pin_relative_paths
from .hub_policy import policy_violations, with_placeholder_urls
from .local_files import missing_files
from .losses import Distill
from .plain_yaml import Location, impossible_values, replace_impossible, short
from .problems import dotted_key, problem_lines, raise_problems, remove_unknown_keys, remove_wrong_values
from .resolve import RecipeSource, find_recipe, list_recipes, on_the_hub, packaged_text
from .safe_yaml import read_yaml
from .schema import Recipe
from .smoke import smoke_values
from .stages import direct_values, planned_values, stage_values
from .train import Train

_FILE_ONLY_KEYS = ("extends", "requires", "origin")
_MAX_ROUNDS = 4  # validations without the wrong values, to find the contradictions that they hide
_MAX_KEY_PARTS = 16  # dotted parts in the key of an override


def load_recipe(reference: str | Mapping[str, object], overrides: Sequence[str] = (), smoke: bool = False) -> Recipe:
    """Read and validate a recipe.

    Args:
        reference: Name of a packaged recipe, path of a YAML file, or address on the Hub (hf://org/repo@revision/file);
            or a nested dict of what the file would contain. Relative paths in a dict refer to the current folder.
        overrides: `key=value` with a dotted key, such as `train.max_steps=20`; the value is YAML.
        smoke: Replace the models by tiny random ones and train for a few steps. Overrides take precedence.

    Returns:
        The validated recipe.

    Raises:
        DistillError: The recipe is not found, is not YAML, is invalid, needs a newer hf-distill, or is an untrusted
            recipe from the Hub with values that are not allowed. The message lists every problem with its key.

    Example:
        recipe = load_recipe("quickstart", ["train.max_steps=20"])
        result = run_recipe(recipe)
    """
    if isinstance(reference, str):
        source = find_recipe(reference)
        values, folder = resolve_values(source, reference), source.folder
    else:
        values, folder = _resolve_base(deepcopy(cast(JSONObject, dict(reference))), "The recipe"), Path()
    if smoke:
        values = smoke_values(validate(values, folder))
    for override in overrides:
        _apply_override(values, override)
    return validate(values, folder)


def resolve_values(source: RecipeSource, reference: str) -> JSONObject:
    """Return the values of a recipe merged into those of the recipe that it extends.

    An untrusted recipe from the Hub is checked, and its relative paths are pinned to its commit.

    Raises:
        DistillError: see `load_recipe`.
    """
    values = read_yaml(source.text, reference)
    if not isinstance(values, dict):
        raise DistillError(
            f"{reference} is not a mapping. A recipe is a YAML mapping with the keys student, teacher, data and train."
        )
    values = _resolve_base(values, reference)
    if source.origin is None:
        return values
    values = pin_relative_paths(values, source.origin)
    if problems := policy_violations(validate(with_placeholder_urls(values), source.folder)):
        raise_problems(problems, f"in the untrusted recipe {source.origin}")
    return values | {"origin": source.origin}


def _resolve_base(values: JSONObject, reference: str) -> JSONObject:
    _check_version(values.get("requires"), reference)
    return apply_extends(values, reference)


def _check_version(requires: JSON, reference: str) -> None:
    if requires is None:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        supported = SpecifierSet(requires if isinstance(requires, str) else "?")
    except InvalidSpecifier:
        raise DistillError(f"requires: {short(requires)} is not a range of versions. Write it as '>=0.2'.") from None
    if not supported.contains(__version__, prereleases=True):
        raise DistillError(
            f"{reference} requires hf-distill {requires}, and version {__version__} is installed. Run: "
            "pip install --upgrade hf-distill"
        )


def apply_extends(values: JSONObject, reference: str) -> JSONObject:
    """Return the values of the recipe that `extends` names, overridden by these; see `deep_merge`."""
    name = values.get("extends")
    if name is None:
        return values
    if not isinstance(name, str):
        raise DistillError(f"{reference}: extends must be the name of a packaged recipe; got {short(name)}.")
    merged = deep_merge(read_yaml(packaged_text(name), name), {k: v for k, v in values.items() if k != "extends"})
    assert isinstance(merged, dict)
    return merged


def deep_merge(base: JSON, changes: JSON) -> JSON:
    """Return `base` overridden by `changes`. Mappings are merged key by key; other values are replaced."""
    if isinstance(base, dict) and isinstance(changes, dict):
        return base | {key: deep_merge(base.get(key), value) for key, value in changes.items()}
    return changes


def validate(values: JSONObject, folder: Path = Path(), list_missing: bool = True) -> Recipe:
    """Validate the plain values of a recipe.

    Args:
        values: Values as read from YAML.
        folder: Folder to which relative paths of DeepSpeed configs refer.
        list_missing: Whether the message for an invalid recipe lists missing files too.

    Returns:
        The recipe.

    Raises:
        DistillError: The recipe is invalid. The message has a line for every problem, with its key.
    """
    locations = [(location, problem) for location, problem in impossible_values(values)]
    problems = [f"{dotted_key(location)}: {problem}" for location, problem in locations]
    values = replace_impossible(values)
    for part in ("teacher", "train"):
        if isinstance(section := values.get(part), dict) and isinstance(config := section.get("deepspeed"), str | dict):
            try:
                values = {**values, part: {**section, "deepspeed": _deepspeed(config, part, folder)}}
            except DistillError as error:
                problems.append(f"{part}.deepspeed: {error}")
    recipe, wrong = _validate_fields(values, {location for location, _ in locations})
    problems += [line for line in [*wrong, *_stage_problems(values)] if line not in problems]
    if recipe is not None and not problems:
        dumped = recipe.model_dump(exclude_none=True, exclude_unset=True)
        problems += [f"{dotted_key(location)}: {problem}" for location, problem in impossible_values(dumped)]
        for number in range(1, len(recipe.stages) + 1):
            with collect_errors(problems):
                validate(stage_values(recipe, number), folder, list_missing=False)
    if recipe is None or problems:
        named = {line.partition(": ")[0] for line in problems}
        missing = missing_files(values) if list_missing else []
        problems += [line for line in missing if line.partition(": ")[0] not in named]
        raise_problems(problems, "in the recipe")
    assert recipe is not None
    return recipe


def _validate_fields(values: JSONObject, reported_locations: set[Location]) -> tuple[Recipe | None, list[str]]:
    """Return the recipe, if it is valid, and all problems, also those that an unknown key would hide.

    Args:
        values: Values of a recipe; see `validate`.
        reported_locations: Locations whose problem is already reported.
    """
    lines: list[str] = []
    values, has_removed_keys = deepcopy(values), True
    recipe = None
    while has_removed_keys:
        has_removed_keys = False
        try:
            recipe = Recipe.model_validate(values)
        except ValidationError as error:
            items = error.errors()
            new = problem_lines([item for item in items if item["loc"] not in reported_locations], values)
            lines += [line for line in new if line not in lines]
            has_removed_keys = remove_unknown_keys(values, items)
    return recipe, lines + (_hidden_contradictions(values, lines) if recipe is None else [])


def _hidden_contradictions(values: JSONObject, reported_problems: list[str]) -> list[str]:
    """List the contradictions that pydantic does not check while a value is invalid.

    They are found by validating without the invalid values. A contradiction that names a removed value is not reported,
    because the user did not cause it.
    """
    values, names, lines = deepcopy(values), set[str](), list[str]()
    for _ in range(_MAX_ROUNDS):
        try:
            Recipe.model_validate(values)
            break
        except ValidationError as error:
            items = error.errors()
        new = problem_lines([item for item in items if item["type"] == "value_error"], values)
        lines += [
            line for line in new if line not in reported_problems + lines and not any(name in line for name in names)
        ]
        left_out = remove_wrong_values(values, items)
        if not left_out:
            break
        names |= left_out
    return lines


def _stage_problems(values: JSONObject) -> list[str]:
    """List the problems in the `train` and `distill` sections of the stages."""
    lines, stages = [], values.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        for part, kind, needed in (("train", Train, {"output_dir": "runs"}), ("distill", Distill, {})):
            section = stage.get(part) if isinstance(stage, dict) else None
            if not isinstance(section, dict):
                continue
            try:
                kind.model_validate(needed | section)
            except ValidationError as error:
                items = error.errors()
                source = problem_lines([item | {"loc": (part, *item["loc"])} for item in items], {part: section})
                lines += [f"stages.{number}.{line}" for line in source]
    return lines


def recipes_by_stage(recipe: Recipe) -> dict[str, Recipe]:
    """Return the recipes of all stages by name, as far as they are known before the run; without stages {"": recipe}.

    The recipe of the control of a chain has the name "direct".
    """
    if not recipe.stages:
        return {"": recipe}
    parts = planned_values(recipe) | ({"direct": direct_values(recipe)} if recipe.control == "direct" else {})
    return {name: validate(part) for name, part in parts.items()}


def _deepspeed(config: str | JSONObject, part: str, folder: Path) -> JSONObject:
    """Return the content of a DeepSpeed config, so that the recipe.yaml of a run is self-contained."""
    content = read_deepspeed(config, folder)
    if part == "teacher":
        check_teacher_config(content)
    return content


def _apply_override(values: JSONObject, override: str) -> None:
    key, equals, text = override.partition("=")
    if on_the_hub(override) or override.endswith((".yaml", ".yml")) or override in list_recipes():
        raise DistillError(
            f"{short(override)} is a second recipe, and this command takes one. To check several recipes, use "
            "`hf-distill recipes validate`. To build on another recipe, write `extends: NAME` into the file."
        )
    if not equals or not key:
        raise DistillError(f"{short(override)} is not an override. Write key=value, such as train.max_steps=20.")
    *parents, last = key.split(".")
    if key in _FILE_ONLY_KEYS:
        raise DistillError(
            f"{short(override)}: {key} cannot be overridden, because it is read before overrides are applied. "
            "Set it in the file of the recipe."
        )
    if len(parents) >= _MAX_KEY_PARTS:
        raise DistillError(f"{short(override)}: a key can have at most {_MAX_KEY_PARTS} dotted parts.")
    for name in parents:
        section = values.setdefault(name, {})
        if isinstance(section, list):  # teachers.NAME.key=value
            section = {str(each["name"]): each for each in section if isinstance(each, dict) and "name" in each}
        if not isinstance(section, dict):
            raise DistillError(f"{short(override)}: {short(name)} is not a mapping, so it has no key {short(last)}.")
        values = section
    values[last] = read_yaml(text, override)
