"""The base model of all recipe sections, and the type for names of files, models and datasets. Imports no torch."""

import os
import types
import typing
from functools import cache
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

_MAX_COMPONENT_BYTES, _MAX_PATH_BYTES = 255, 4096  # the limits of Linux


class StrictModel(BaseModel):
    """A section of a recipe. Unknown keys, non-finite numbers, and booleans in the place of numbers are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: object, info: ValidationInfo) -> object:
        if info.field_name and _has_boolean(value) and not _takes_booleans(cls, info.field_name):
            raise ValueError("must be a number, not true or false")
        return value


def check_name(name: str) -> str:
    """Expand `~` in the name of a file, model or dataset, and check its length.

    Raises:
        ValueError: The name is longer than a file system allows.
    """
    if name == "~" or name.startswith("~/"):
        name = os.path.expanduser(name)
    size, longest = (
        len(name.encode(errors="replace")),
        max(len(part.encode(errors="replace")) for part in name.split("/")),
    )
    if size > _MAX_PATH_BYTES or longest > _MAX_COMPONENT_BYTES:
        raise ValueError(
            f"the name has {size:,} bytes, and its longest part {longest:,}; a name can have at most "
            f"{_MAX_PATH_BYTES:,} bytes, and each part {_MAX_COMPONENT_BYTES}"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


def _has_boolean(value: object) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_boolean, value))
    if isinstance(value, dict):
        return any(map(_has_boolean, value.values()))
    return isinstance(value, bool)


@cache
def _takes_booleans(cls: type[BaseModel], field: str) -> bool:
    return _includes_boolean(cls.model_fields[field].annotation)


def _includes_boolean(annotation: object) -> bool:
    """Whether a type accepts booleans at some depth. Nested models are not searched: they check their own fields."""
    if isinstance(annotation, typing.ForwardRef | str):
        return True
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return any(isinstance(value, bool) for value in inner)
    if origin in (typing.Union, types.UnionType, Annotated, list, tuple, dict):
        return any(map(_includes_boolean, inner))
    if annotation in (bool, object, dict, list):
        return True
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)
