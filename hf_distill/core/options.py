"""Types and ranges of the options of losses, as JSON Schema. Imports no torch."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import cast

BETWEEN_0_AND_1 = {"exclusiveMinimum": 0, "exclusiveMaximum": 1}
POSITIVE = {"exclusiveMinimum": 0}
FROM_0_TO_1 = {"minimum": 0, "maximum": 1}
COUNT = {"type": "integer", "minimum": 1}

_TYPES: tuple[tuple[type, str], ...] = ((bool, "boolean"), (int, "number"), (float, "number"), (str, "string"))
_LIMITS = {
    "minimum": ("at least {}", lambda value, limit: value >= limit),
    "exclusiveMinimum": ("above {}", lambda value, limit: value > limit),
    "maximum": ("at most {}", lambda value, limit: value <= limit),
    "exclusiveMaximum": ("below {}", lambda value, limit: value < limit),
}


def option_schema(default: object, limits: Mapping[str, object]) -> dict[str, object]:
    """Return the JSON Schema of an option: its default, the type of its default, and its limits.

    Args:
        default: default of the function's parameter; None allows any type, unless the limits have a type.
        limits: keys of JSON Schema, such as `BETWEEN_0_AND_1`.
    """
    kind = next((name for type_, name in _TYPES if isinstance(default, type_)), None)
    return {"default": default} | ({"type": kind} if kind else {}) | dict(limits)


def option_problem(name: str, value: object, schema: Mapping[str, object]) -> str | None:
    """Return an error message for the value of an option; None if it is valid.

    An option whose default is None may be None.

    Args:
        name: name of the option.
        value: value to check.
        schema: see `option_schema`.
    """
    kind = schema.get("type")
    if value is None and schema["default"] is None:
        return None
    if kind in ("number", "integer"):
        is_number = isinstance(value, Real) and not isinstance(value, bool) and _is_finite(value)
        if not is_number or (kind == "integer" and value != math.trunc(cast(float, value))):
            return f"{name} is {_short(value)}; it must be {'a whole number' if kind == 'integer' else 'a number'}"
        violated = [key for key, (_, holds) in _LIMITS.items() if key in schema and not holds(value, schema[key])]
        if violated:
            limits = " and ".join(text.format(schema[key]) for key, (text, _) in _LIMITS.items() if key in schema)
            return f"{name} is {_short(value)}; it must be {limits}"
    elif "enum" in schema and value not in (choices := cast("tuple[str, ...]", schema["enum"])):
        return f"{name} is {_short(value)}; it must be one of {', '.join(map(str, choices))}"
    elif kind in ("boolean", "string") and not isinstance(value, bool if kind == "boolean" else str):
        return f"{name} is {_short(value)}; it must be a {kind}"
    return None


def _is_finite(value: Real) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of floats
        return False


def _short(value: object) -> str:
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
