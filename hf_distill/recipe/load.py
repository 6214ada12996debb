"""From a reference to a validated recipe."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..core.deepspeed_config import check_teacher_config, read_deepspeed
from ..errors import DistillError, collect_errors
from ..version import __version__
from .hub_paths import pin_relative_paths
from .hub_policy import policy_violations
from .local_files import missing_files
from .losses import Distill
from .plain_yaml import Place, impossible_values, replaced, short
from .problems import lines_of, place_of, raise_problems, with_known_keys, without_wrong_values
from .resolve import RecipeSource, find_recipe, list_recipes, on_the_hub, packaged_text
from .safe_yaml import read_yaml
from .schema import Recipe, Train
from .smoke import smoke_values
from .stages import direct_values, planned_values, stage_values

_OF_THE_FILE = ("extends", "requires", "origin")
_ROUNDS = 4  # in which wrong values are left out to find what they hide
_DEEPEST = 16  # parts of the key of an override


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
    values = resolve_values(found, reference)
    if smoke:
        values = smoke_values(validate(values, found.folder).model_dump(exclude_unset=True))
    for override in overrides:
        _set(values, override)
    return validate(values, found.folder)


def resolve_values(found: RecipeSource, reference: str) -> dict[str, Any]:
    """A recipe's values with what it extends; of one from the Hub, checked and with the files beside it in place.

    Raises:
        DistillError: see `load_recipe`.
    """
    values = read_yaml(found.text, reference)
    if not isinstance(values, dict):
        raise DistillError(f"{reference} is not a mapping of student, teacher, data, distill, train.")
    _check_version(values.get("requires"), reference)
    values = apply_extends(values, reference)
    if found.origin is None:
        return values
    values = pin_relative_paths(values, found.origin)
    if problems := policy_violations(validate(values, found.folder)):
        raise_problems(problems, f"in the recipe, which is a stranger's ({found.origin})")
    return values | {"origin": found.origin}


def _check_version(requires: Any, reference: str) -> None:
    if requires is None:
        return
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        wanted = SpecifierSet(requires if isinstance(requires, str) else "?")
    except InvalidSpecifier:
        raise DistillError(f"requires: {short(requires)} is no range of versions: write it as '>=0.2'.") from None
    if not wanted.contains(__version__, prereleases=True):
        raise DistillError(
            f"{reference} requires hf-distill {requires}, and this is {__version__}: pip install --upgrade hf-distill"
        )


def apply_extends(values: dict[str, Any], reference: str) -> dict[str, Any]:
    """A packaged recipe's values with these in their place: mappings key by key, anything else whole."""
    name = values.get("extends")
    if name is None:
        return values
    if not isinstance(name, str):
        raise DistillError(f"{reference}: extends takes the name of a packaged recipe; got {short(name)}.")
    base = read_yaml(packaged_text(name), name)
    return deep_merge(base, {key: value for key, value in values.items() if key != "extends"})


def deep_merge(base: Any, own: Any) -> Any:
    """Values of `own` over those of `base`; mappings are merged key by key."""
    if isinstance(base, dict) and isinstance(own, dict):
        return base | {key: deep_merge(base.get(key), value) for key, value in own.items()}
    return own


def validate(values: dict[str, Any], folder: Path = Path(), list_missing: bool = True) -> Recipe:
    """A recipe from plain values.

    Args:
        values: of the YAML.
        folder: where the names of DeepSpeed files start.
        list_missing: of a recipe that is refused, whether to list files that do not exist, too.

    Raises:
        DistillError: every problem, a line each: its place, what is wrong, what is near.
    """
    places = [(place, problem) for place, problem in impossible_values(values)]
    problems = [f"{place_of(place)}: {problem}" for place, problem in places]
    values = replaced(values)
    for part in ("teacher", "train"):
        if isinstance(given := values.get(part), dict) and isinstance(given.get("deepspeed"), str | dict):
            try:
                values = {**values, part: {**given, "deepspeed": _deepspeed(given["deepspeed"], part, folder)}}
            except DistillError as error:
                problems.append(f"{part}.deepspeed: {error}")
    recipe, wrong = _validated(values, {place for place, _ in places})
    problems += [line for line in [*wrong, *_of_stages(values)] if line not in problems]
    if recipe is not None and not problems:
        dumped = recipe.model_dump(exclude_none=True, exclude_unset=True)
        problems += [f"{place_of(place)}: {problem}" for place, problem in impossible_values(dumped)]
        for number in range(1, len(recipe.stages) + 1):
            with collect_errors(problems):
                validate(stage_values(dumped, number), folder, list_missing=False)
    if recipe is None or problems:
        named = {line.partition(": ")[0] for line in problems}
        missing = missing_files(values) if list_missing else []
        problems += [line for line in missing if line.partition(": ")[0] not in named]
        raise_problems(problems, "in the recipe")
    assert recipe is not None
    return recipe


def _validated(values: dict[str, Any], known: set[Place]) -> tuple[Recipe | None, list[str]]:
    """A recipe, and all problems: an unknown key does not hide what else is wrong.

    Args:
        values: see `validate`.
        known: places of which the problem is known already.
    """
    lines: list[str] = []
    values, left = deepcopy(values), True
    recipe = None
    while left:
        left = False
        try:
            recipe = Recipe.model_validate(values)
        except ValidationError as error:
            items: Any = error.errors()
            new = [line for item in items if item["loc"] not in known for line in lines_of(item)]
            lines += [line for line in new if line not in lines]
            values, left = with_known_keys(values, items)
    return recipe, lines + (_hidden_contradictions(values, lines) if recipe is None else [])


def _hidden_contradictions(values: dict[str, Any], known: list[str]) -> list[str]:
    """Contradictions that pydantic does not look for while a value is wrong: found without the wrong values.

    One that names a value that was left out is none that its user made.
    """
    values, names, lines = deepcopy(values), set[str](), list[str]()
    for _ in range(_ROUNDS):
        try:
            Recipe.model_validate(values)
            break
        except ValidationError as error:
            items: Any = error.errors()
        new = [line for item in items if item["type"] == "value_error" for line in lines_of(item)]
        lines += [line for line in new if line not in known + lines and not any(name in line for name in names)]
        left_out = without_wrong_values(values, items)
        if not left_out:
            break
        names |= left_out
    return lines


def _of_stages(values: dict[str, Any]) -> list[str]:
    """Problems of what the stages of a chain have in the place of the recipe's `train` and `distill`."""
    lines, stages = [], values.get("stages")
    for number, stage in enumerate(stages if isinstance(stages, list) else ()):
        for part, kind, needed in (("train", Train, {"output_dir": "runs"}), ("distill", Distill, {})):
            given = stage.get(part) if isinstance(stage, dict) else None
            if not isinstance(given, dict):
                continue
            try:
                kind.model_validate(needed | given)
            except ValidationError as error:
                items: Any = error.errors()
                found = [line for item in items for line in lines_of(item | {"loc": (part, *item["loc"])})]
                lines += [f"stages.{number}.{line}" for line in found]
    return lines


def recipes_by_stage(recipe: Recipe) -> dict[str, Recipe]:
    """A recipe, as ""; of a chain the recipe of each stage, as far as it is known before the chain runs, and of its
    control, which is called "direct".
    """
    if not recipe.stages:
        return {"": recipe}
    values = recipe.model_dump(exclude_none=True, exclude_unset=True)
    parts = planned_values(values) | ({"direct": direct_values(values)} if recipe.control == "direct" else {})
    return {name: validate(part) for name, part in parts.items()}


def _deepspeed(config: str | dict[str, Any], part: str, folder: Path) -> dict[str, Any]:
    """The content of a DeepSpeed JSON, in the place of its name: a run's recipe.yaml says all of it."""
    content = read_deepspeed(config, folder)
    if part == "teacher":
        check_teacher_config(content)
    return content


def _set(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if on_the_hub(override) or override.endswith((".yaml", ".yml")) or override in list_recipes():
        raise DistillError(
            f"{short(override)} is a second recipe, and this command takes one. To check several, give them to "
            "`hf-distill recipes validate`; to build on another one, write `extends: NAME` into the file."
        )
    if not equals or not key:
        raise DistillError(f"{short(override)} is not an override: write key=value, such as train.max_steps=20.")
    *parents, last = key.split(".")
    if key in _OF_THE_FILE:
        raise DistillError(f"{short(override)}: {key} is read before key=value is, so write it into the recipe's file.")
    if len(parents) >= _DEEPEST:
        raise DistillError(f"{short(override)}: a key has at most {_DEEPEST} parts.")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise DistillError(f"{short(override)}: {short(name)} is not a mapping, so it has no {short(last)}.")
    values[last] = read_yaml(text, override)
