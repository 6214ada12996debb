"""The `distill` and `losses` sections of a recipe. Imports no torch."""

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Literal, Self, TypedDict, cast

from pydantic import ConfigDict, Field, field_validator, model_validator

from ..core.defaults import ALPHA, CROSS_TOKENIZER_TEMPERATURE, DIVERGENCE, TEMPERATURE
from ..core.json_types import JSON, JSONObject
from ..core.loss_kinds import CHUNKS, FEATURES
from ..core.options import option_problem
from ..core.strict_model import StrictModel
from ..errors import did_you_mean
from ..layers import check_layers
from .plain_yaml import short


class LossSchema(TypedDict):
    """The input of a loss ("logits", "hidden", ...; None without a teacher), and the schemas of its options."""

    compares: str | None
    options: dict[str, JSONObject]


class _Discriminator(TypedDict):
    """Reference to a definition for each value of the key `name`."""

    mapping: dict[str, str]


# The keys of JSON Schema that are read here.
JSONSchema = TypedDict(
    "JSONSchema",
    {
        "$defs": dict[str, "JSONSchema"],
        "$ref": str,
        "additionalProperties": "bool | JSONSchema",
        "anyOf": list["JSONSchema"],
        "discriminator": "_Discriminator",
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


def losses_on_chunks() -> list[str]:
    """Return the losses for a teacher with another tokenizer."""
    losses = packaged_schema()["$defs"]["LossSpec"]["x-losses"]
    return [name for name, loss in losses.items() if loss["compares"] in CHUNKS]


def tokenizer_problems(spec: "LossSpec", is_cross_tokenizer: bool) -> list[str]:
    """Describe why an additional loss does not work with the tokenizer of its teacher; empty if it works.

    Args:
        spec: the loss.
        is_cross_tokenizer: whether the teacher has another tokenizer than the student.
    """
    compares = packaged_schema()["$defs"]["LossSpec"]["x-losses"][spec.name]["compares"]
    if compares in CHUNKS and not is_cross_tokenizer:
        return [
            f"losses: {spec.name} compares spans of text with a teacher of another tokenizer: set "
            f"distill.cross_tokenizer to {spec.name}, or remove the loss"
        ]
    if not is_cross_tokenizer or compares is None or compares in CHUNKS:
        return []
    if compares in FEATURES:
        return [
            f"losses: {spec.name} compares features of tokens, and with distill.cross_tokenizer the teacher has other "
            "tokens: remove it"
        ]
    return [
        f"losses: {spec.name} compares ids of one tokenizer, and with distill.cross_tokenizer the teacher has another "
        f"one: use {', '.join(losses_on_chunks())}, or remove it"
    ]


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


class OriginLosses(StrictModel):
    """The losses of the target tokens of one author; a value that is not set is that of `distill`."""

    alpha: float | None = Field(
        None, ge=0, le=1, description="Weight of the divergence, from 0 to 1. Default (null): distill.alpha."
    )
    divergence: str | dict[str, object] | None = Field(
        None,
        description="Divergence: the name of a loss, or {name: ..., option: ...}. Default (null): distill.divergence.",
    )

    @field_validator("divergence")
    @classmethod
    def _check_name(cls, value: str | dict[str, object] | None) -> str | dict[str, object] | None:
        return None if value is None else _check_divergence(value)

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if self.alpha is None and self.divergence is None:
            raise ValueError("set divergence, alpha, or both")
        return self


class Distill(StrictModel):
    """The objective: alpha * T^2 * divergence + (1 - alpha) * cross-entropy, averaged over the target tokens."""

    temperature: float = Field(
        TEMPERATURE,
        gt=0,
        description="Temperature T of both softmax distributions in the divergence, above 0. "
        f"Default: {TEMPERATURE:g}, or {CROSS_TOKENIZER_TEMPERATURE:g} with cross_tokenizer.",
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
    cross_tokenizer: str | dict[str, object] | None = Field(
        None,
        description="For a teacher with another tokenizer: the loss that takes the place of the divergence, alm, "
        "projected_kl or uld, or {name: ..., option: ...}. Default (null): teacher and student have one tokenizer.",
    )

    by_origin: dict[Literal["teacher", "student", "data"], OriginLosses] | None = Field(
        None,
        description="Losses that depend on who wrote the target tokens: teacher, student or data -> {divergence: ..., "
        "alpha: ...}. The author of a row is the key origin of its source, or the column origin of the data; in "
        "on-policy training, student for what the student generates, else data. Default (null): all tokens have the "
        "same losses.",
    )

    @model_validator(mode="before")
    @classmethod
    def _set_default_temperature(cls, values: object) -> object:
        if isinstance(values, Mapping) and values.get("cross_tokenizer") is not None:
            return {"temperature": CROSS_TOKENIZER_TEMPERATURE, **values}
        return values

    @field_validator("divergence")
    @classmethod
    def _check_name(cls, value: str | dict[str, object]) -> str | dict[str, object]:
        return _check_divergence(value)

    @field_validator("cross_tokenizer")
    @classmethod
    def _check_cross_tokenizer(cls, value: str | dict[str, object] | None) -> str | dict[str, object] | None:
        if value is None:
            return None
        name, compares = _soft_loss(value)
        if compares not in CHUNKS:
            raise ValueError(
                f"loss {name!r} compares ids of one tokenizer; use one of {', '.join(losses_on_chunks())}"
                if compares == "logits"
                else f"loss {name!r} does not compare text; use one of {', '.join(losses_on_chunks())}"
            )
        return value

    @model_validator(mode="after")
    def _check_one_soft_loss(self) -> Self:
        if self.cross_tokenizer is not None and self.divergence != DIVERGENCE:
            raise ValueError(
                f"divergence is {short(self.divergence)} and cross_tokenizer is {short(self.cross_tokenizer)}, which "
                "takes the place of the divergence: remove divergence"
            )
        if self.cross_tokenizer is not None and self.by_origin:
            raise ValueError(
                "by_origin chooses divergences on ids of one tokenizer, and cross_tokenizer is set: remove one of them"
            )
        return self

    @property
    def soft_loss(self) -> str | dict[str, object]:
        """The loss of the soft term: `cross_tokenizer` if it is set, else `divergence`."""
        return self.divergence if self.cross_tokenizer is None else self.cross_tokenizer

    @property
    def soft_temperature(self) -> float | None:
        """T of the soft loss: its option, or `temperature`; None if the soft loss has no temperature."""
        loss = {"name": self.soft_loss} if isinstance(self.soft_loss, str) else self.soft_loss
        options = packaged_schema()["$defs"]["LossSpec"]["x-losses"][str(loss["name"])]["options"]
        return cast(float, loss.get("temperature", self.temperature)) if "temperature" in options else None


def _check_divergence(value: str | dict[str, object]) -> str | dict[str, object]:
    """Return the name of a divergence with its options, after checking them."""
    name, compares = _soft_loss(value)
    if compares in CHUNKS:
        raise ValueError(f"loss {name!r} is for a teacher with another tokenizer: set cross_tokenizer to it")
    if compares != "logits":
        raise ValueError(f"loss {name!r} does not use the teacher's logits, so it cannot be the divergence")
    return value


def _soft_loss(value: str | dict[str, object]) -> tuple[object, str | None]:
    """Return the name of a loss with its options, after checking them, and what it compares."""
    options = {"name": value} if isinstance(value, str) else {**value}
    name = options.pop("name", None)
    return name, _check_loss(name, options)["compares"]
