"""The base of all mappings of a recipe, and the type of names of files, models and data sets. Imports no torch."""

import os
import types
import typing
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationInfo, field_validator

_COMPONENT, _PATH = 255, 4096  # bytes; what Linux allows


class StrictModel(BaseModel):
    """A mapping of a recipe in which every key is known; numbers are finite, and true and false are no numbers."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _booleans_are_no_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        if info.field_name and _has_boolean(value) and not _takes_booleans(cls, info.field_name):
            raise ValueError("true and false are no numbers")
        return value


def check_name(name: str) -> str:
    """A name of a file, model or data set with `~` as the user's folder.

    Raises:
        ValueError: it is longer than a file system allows.
    """
    if name == "~" or name.startswith("~/"):
        name = os.path.expanduser(name)
    size, longest = len(name.encode(errors="replace")), max(len(p.encode(errors="replace")) for p in name.split("/"))
    if size > _PATH or longest > _COMPONENT:
        raise ValueError(
            f"a name of {size:,} bytes, whose longest part has {longest:,}; at most {_PATH:,} and {_COMPONENT} are "
            "possible"
        )
    return name


Name = Annotated[str, AfterValidator(check_name)]


def _has_boolean(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(map(_has_boolean, value))
    if isinstance(value, dict):
        return any(map(_has_boolean, value.values()))
    return isinstance(value, bool)


@cache
def _takes_booleans(cls: type[BaseModel], field: str) -> bool:
    return _includes_boolean(cls.model_fields[field].annotation)


def _includes_boolean(annotation: Any) -> bool:
    """Whether a type has booleans somewhere in it; those of a mapping with fields are its own to check."""
    if isinstance(annotation, typing.ForwardRef | str):
        return True
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return any(isinstance(value, bool) for value in inner)
    if origin in (typing.Union, types.UnionType, Annotated, list, tuple, dict):
        return any(map(_includes_boolean, inner))
    return annotation in (bool, Any, dict, list) or (isinstance(annotation, type) and issubclass(annotation, BaseModel))
