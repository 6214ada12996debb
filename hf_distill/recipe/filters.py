"""The types of `generate.filters` and `generate.select` in a recipe. Imports no torch."""

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import BeforeValidator, Discriminator, GetJsonSchemaHandler, Tag, ValidationError
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from ..core.json_types import JSON, JSONObject
from ..filters import FILTERS, SELECTIONS, RowFilter, Selection


def evaluation_data(values: JSON) -> Iterator[tuple[str, JSONObject]]:
    """Yield (location, mapping with a path) for the evaluation data that the filters of a recipe name.

    Args:
        values: Values of a recipe, which need not be valid. Values of a wrong type are ignored.
    """
    section = values.get("generate") if isinstance(values, dict) else None
    filters = section.get("filters") if isinstance(section, dict) else None
    for i, step in enumerate(filters if isinstance(filters, list) else ()):
        data = step.get("data") if isinstance(step, dict) else None
        for j, entry in enumerate(data if isinstance(data, list) else ()):
            if isinstance(entry, dict):
                yield f"generate.filters.{i}.data.{j}", entry


class _StepSchema:
    """Writes into the JSON Schema which model a name selects, and that a name is short for {name: ...}."""

    def __init__(self, steps: Mapping[str, type[RowFilter] | type[Selection]]):
        self.steps = steps

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        models = handler(schema)
        mapping = {name: model["$ref"] for name, model in zip(self.steps, models["oneOf"], strict=True)}
        models["discriminator"] = {"propertyName": "name", "mapping": mapping}
        return {"anyOf": [{"enum": [name for name, step in self.steps.items() if _needs_no_options(step)]}, models]}


def _needs_no_options(step: type[RowFilter] | type[Selection]) -> bool:
    try:
        step.model_validate({})
    except ValidationError:
        return False
    return True


def _with_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


def _name_of(value: object) -> object:
    return value.get("name") if isinstance(value, Mapping) else getattr(value, "name", None)


def _one_of(steps: Mapping[str, type[RowFilter] | type[Selection]]) -> Any:
    """Return the type whose values are one of some filters or selections, chosen by `name`."""
    union = reduce(or_, (Annotated[step, Tag(name)] for name, step in steps.items()))
    return Annotated[union, Discriminator(_name_of), BeforeValidator(_with_name), _StepSchema(steps)]


if TYPE_CHECKING:
    FilterSpec: TypeAlias = RowFilter
    SelectSpec: TypeAlias = Selection
else:
    FilterSpec, SelectSpec = _one_of(FILTERS), _one_of(SELECTIONS)
