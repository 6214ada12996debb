"""Types of parsed JSON and YAML. The module imports nothing, so that recipes are validated without torch."""

from typing import TypeAlias

JSON: TypeAlias = "dict[str, JSON] | list[JSON] | str | int | float | bool | None"
JSONObject: TypeAlias = dict[str, JSON]
