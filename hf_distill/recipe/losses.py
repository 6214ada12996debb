"""The `distill` and `losses` sections of a recipe. Imports no torch."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Self, TypedDict

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..core.defaults import ALPHA, DIVERGENCE, TEMPERATURE
from ..core.json_types import JSON, JSONObject
from ..core.options import option_problem
from ..core.strict_model import StrictModel
from ..errors import did_you_mean
from ..layers import check_layers
from .plain_yaml import short


class LossSchema(TypedDict):
    """What a loss compares ("logits", "hidden_states", ...; None without a teacher), and the schemas of its options."""

    compares: str | None
    options: dict[str, JSONObject]


# The keys of JSON Schema that are read here.
JSONSchema = TypedDict(
    "JSONSchema",
    {
        "$defs": dict[str, "JSONSchema"],
        "$ref": str,
        "additionalProperties": "bool | JSONSchema",
        "anyOf": list["JSONSchema"],
        "enum": list[JSON],
        "items": "JSONSchema",
        "properties": dict[str, "JSONSchema"],
        "type": list[str],
        "x-losses": dict[str, LossSchema],
    },
    total=False,
)


@cache
def packaged_schema() -> JSONSchema:
    """Return the packaged JSON Schema of recipes, which `hf_distill.recipe.generate_schema` writes."""
    return json.loads(files(__package__).joinpath("schema.json").read_text())


def _check_loss(name: object, options: Mapping[str, object]) -> LossSchema:
    """Return a loss after checking that it is registered, has the given options, and that their values are in range.

    Raises:
        ValueError: one of these checks fails. The message lists all problems.
    """
    losses = packaged_schema()["$defs"]["LossSpec"]["x-losses"]
    if not isinstance(name, str) or name not in losses:
        raise ValueError(f"unknown loss {short(name)}{did_you_mean(str(name), losses)}")
    schemas, problems = losses[name]["options"], []
    for option, value in options.items():
        if option not in schemas:
            takes = ", ".join(schemas) or "none"
            problems.append(f"loss {name!r} has no option {short(option)}; its options are: {takes}")
        elif problem := option_problem(option, value, schemas[option]):
            problems.append(f"loss {name!r}: {problem}")
    if problems:
        raise ValueError("; ".join(problems))
    return losses[name]


class LossSpec(StrictModel):
    """An additional loss term. Further keys are options of the loss, such as `layers`."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(description="Name of a registered loss.")
    weight: float = Field(1.0, description="Weight of the term in the total loss. Default: 1.")
    teacher: str | None = Field(
        None, description="Name of the teacher that the loss compares with. Default (null): the first teacher."
    )

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        extra = self.model_extra or {}
        loss = _check_loss(self.name, extra)
        if "layers" in extra:
            check_layers(extra["layers"])
        if extra.get("stack") not in (None, "encoder", "decoder"):
            raise ValueError(f"loss {self.name!r} has stack {short(extra['stack'])}; it must be encoder or decoder")
        if self.teacher is not None and loss["compares"] is None:
            raise ValueError(f"loss {self.name!r} does not use a teacher: remove the key teacher")
        return self


class Distill(StrictModel):
    """The objective: alpha * T^2 * divergence + (1 - alpha) * cross-entropy, averaged over the target tokens."""

    temperature: float = Field(
        TEMPERATURE,
        gt=0,
        description="Temperature T of both softmax distributions in the divergence, above 0. "
        f"Default: {TEMPERATURE:g}.",
    )
    alpha: float = Field(
        ALPHA,
        ge=0,
        le=1,
        description="Weight of the divergence, from 0 to 1; the cross-entropy has the weight 1 - alpha. "
        f"Default: {ALPHA}.",
    )
    divergence: str | dict[str, object] = Field(
        DIVERGENCE,
        description="Divergence between student and teacher logits: the name of a loss, or {name: ..., option: ...}. "
        f"Default: {DIVERGENCE}.",
    )

    @field_validator("divergence")
    @classmethod
    def _check_name(cls, value: str | dict[str, object]) -> str | dict[str, object]:
        options = {"name": value} if isinstance(value, str) else {**value}
        name = options.pop("name", None)
        if _check_loss(name, options)["compares"] != "logits":
            raise ValueError(f"loss {name!r} does not use the teacher's logits, so it cannot be the divergence")
        return value
