"""The shape of a student that is pruned from its teacher, and the units that it keeps. Imports no torch."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, cast

from ..core.json_types import JSONObject
from ..errors import DistillError

Units = dict[str, list[int]]  # name of a module of the teacher -> indices of its units that are kept, ascending


@dataclass(frozen=True)
class PrunedShape:
    """Sizes of a student that is pruned from its teacher; None keeps the teacher's.

    layers:                indices of the layers to keep, each once
    hidden_size:           number of hidden channels
    intermediate_size:     neurons of each feed-forward network: those of the experts too, unless the config has another
                           size for experts
    moe_intermediate_size: neurons of each expert, of models whose config has this size
    num_attention_heads:   query heads of a layer; key-value groups are kept or left out whole, so that
                           `num_key_value_heads` changes by the same factor
    num_experts:           experts of a layer
    """

    layers: tuple[int, ...] | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_experts: int | None = None
    moe_intermediate_size: int | None = None

    def widths(self) -> dict[str, int]:
        """Return the sizes that are not None by their names in the config, without the layers."""
        sizes = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "layers"}
        return {name: size for name, size in sizes.items() if size is not None}


@dataclass(frozen=True)
class KeptUnits:
    """The units of the teacher that a pruned student consists of. None: all of them.

    layers:   indices of the layers
    channels: indices of the hidden channels, which are the same in the whole model
    neurons:  of each feed-forward network; for experts in one tensor, a list for each expert that is kept
    heads:    query heads of each attention
    experts:  of each mixture of experts

    All indices are ascending, and those of the teacher. Modules have their names in the teacher.
    """

    layers: list[int] | None = None
    channels: list[int] | None = None
    neurons: dict[str, list[int] | list[list[int]]] | None = None
    heads: Units | None = None
    experts: Units | None = None

    def to_json(self) -> JSONObject:
        """Return the units as values that `from_json` reads."""
        return cast(JSONObject, asdict(self))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "KeptUnits":
        """Read what `to_json` returned.

        Raises:
            DistillError: the values have other names.
        """
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(names)):
            raise DistillError(f"Kept units have no {', '.join(unknown)}; they have {', '.join(names)}.")
        return cls(**values)
