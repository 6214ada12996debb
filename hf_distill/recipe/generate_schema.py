"""Generates `schema.json` from the code: `python -m hf_distill.recipe.generate_schema`. Imports torch."""

import dataclasses
import enum
import json
import types
import typing
from pathlib import Path

_NAMES = {int: "integer", float: "number", str: "string", bool: "boolean", list: "array", dict: "object"}


def schema() -> dict[str, object]:
    """Build the JSON Schema of recipes from the pydantic model, TrainingArguments and the registered losses."""
    from ..core.loss_kinds import DISTRIBUTION
    from ..losses.registry import LOSSES
    from .schema import Recipe

    result = Recipe.model_json_schema()
    result["properties"]["train"] = {
        "type": "object",
        "description": result["$defs"].pop("Train")["description"],
        "properties": _training_fields(),
        "additionalProperties": False,
        "required": ["output_dir"],
    }
    result["$defs"]["LossSpec"]["x-losses"] = {
        name: {"compares": next(iter(loss.compares), None), "options": loss.option_schemas}
        for name, loss in sorted(LOSSES.items())
        if loss.fits(DISTRIBUTION)  # recipes train language models only
    }
    return result


def _training_fields() -> dict[str, dict[str, object]]:
    from transformers import TrainingArguments

    from ..trainer.config import RUNTIME_FIELDS, DistillArguments
    from .ranges import RANGES

    hints = typing.get_type_hints(TrainingArguments) | {"fsdp": bool | str}  # transformers documents True as the value
    fields = {field.name: _field(hints[field.name]) for field in dataclasses.fields(TrainingArguments) if field.init}
    distill_hints = typing.get_type_hints(DistillArguments)
    fields |= {name: _field(distill_hints[name]) for name in RUNTIME_FIELDS} | {
        "early_stopping_patience": {"type": ["integer"]}
    }
    keys = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    limits = {name: {keys[key]: limit for key, limit in field_range.items()} for name, field_range in RANGES.items()}
    return {name: field | limits.get(name, {}) for name, field in fields.items()}


def _field(hint: object) -> dict[str, object]:
    parts = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for part in parts:
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return {"enum": [member.value for member in part]}
    names = set()
    for part in parts:
        origin = typing.get_origin(part) or part
        name = "boolean" if origin is typing.Literal else _NAMES.get(origin)
        if name:
            names.add(name)
    return {"type": sorted(names) or ["object"]}


if __name__ == "__main__":
    Path(__file__).with_name("schema.json").write_text(json.dumps(schema(), indent=1, ensure_ascii=False) + "\n")
