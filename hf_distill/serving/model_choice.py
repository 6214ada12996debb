"""Which model is served: the teacher of a recipe, or a model that is named directly. Imports no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..errors import DistillError
from ..recipe.models import TeacherSpec
from ..recipe.resolve import list_recipes, on_the_hub
from ..recipe.schema import Recipe
from ..recipe.tasks import require_text_generation


def is_recipe(reference: str) -> bool:
    """Whether a reference names a recipe and not a model: a packaged name, a .yaml file, or an address on the Hub."""
    return on_the_hub(reference) or Path(reference).suffix in (".yaml", ".yml") or reference in list_recipes()


def spec_of_model(model: str, options: Mapping[str, Any]) -> TeacherSpec:
    """Return a frozen teacher.

    Args:
        model: id, path or package:module/file.gguf.
        options: fields of a frozen teacher; None leaves the default.

    Raises:
        DistillError: an option is not valid.
    """
    return _validate({"kind": "frozen", "model": model}, options)


def spec_of_recipe(recipe: Recipe, name: str | None, options: Mapping[str, Any]) -> TeacherSpec:
    """Return the frozen teacher of a recipe, or the source of a cached one.

    Args:
        recipe: the recipe.
        name: name of the teacher, if the recipe has several.
        options: fields that replace those of the recipe; None leaves the recipe's.

    Raises:
        DistillError: there is no such teacher, it is not a frozen one, or an option is not valid.
    """
    require_text_generation(recipe, "`hf-distill serve`")
    named = {getattr(spec, "name", None): spec for spec in recipe.all_teachers}
    if (name is None and len(named) > 1) or (name is not None and name not in named):
        names = ", ".join(key for key in named if key) or "one teacher without a name"
        raise DistillError(
            f"The recipe has {names}, and {f'no teacher {name!r}' if name else 'one teacher is served'}: "
            f"{'pass --teacher NAME' if any(named) else 'leave --teacher out'}."
        )
    spec = named[name] if name is not None else next(iter(named.values()))
    source = spec.source_teacher
    if source.kind != "frozen":
        raise DistillError(
            f"The teacher of the recipe has kind {source.kind}, and only a frozen model can be served: give the model "
            "instead of the recipe."
        )
    return _validate(source.model_dump(exclude_none=True, exclude={"name", "weight"}), options)


def _validate(values: Mapping[str, Any], options: Mapping[str, Any]) -> TeacherSpec:
    changes = {key: value for key, value in options.items() if value is not None}
    try:
        return TeacherSpec.model_validate({**values, **changes})
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}" if first["loc"] else "the options"
        message = first["msg"].removeprefix("Value error, ")
        raise DistillError(f"{option} of the served model: {message} (given: {changes})") from None
