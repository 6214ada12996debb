"""The units of a model: which entries of its weights belong to hidden channels, neurons, heads and experts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from .pruned_shape import KeptUnits

Kind = Literal["channels", "neurons", "heads", "experts"]
NEURON_SIZES = ("intermediate_size", "moe_intermediate_size")
KIND_OF_SIZE: dict[str, Kind] = {
    "hidden_size": "channels",
    **dict.fromkeys(NEURON_SIZES, "neurons"),
    "num_attention_heads": "heads",
    "num_experts": "experts",
}


class Run(NamedTuple):
    """Consecutive entries of a dimension: `size` for each unit, or for each key-value group, from `start` on."""

    start: int
    size: int
    by_group: bool = False


@dataclass(frozen=True)
class Axis:
    """The units that a dimension of a weight belongs to.

    kind:  what the units are
    group: name of the module that owns them: the feed-forward network, the attention, the mixture of experts, or "" for
           hidden channels
    size:  name of the size in the config
    runs:  where the entries of the units are
    """

    kind: Kind
    group: str
    size: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class WidthStructure:
    """Units of a model.

    sizes:    name of a size in the config -> its value, for the sizes whose units were found
    names:    name of a size -> its name in this config, such as `num_local_experts`
    head_dim: size of a query or key head; None if no heads were found
    axes:     name of a parameter -> an axis for each of its dimensions, None for dimensions that keep their size
    shapes:   name of a parameter -> its shape
    missing:  name of a size -> why its units cannot be pruned
    scaled_embeddings: whether the model multiplies its embeddings by sqrt(hidden_size)
    """

    sizes: dict[str, int]
    names: dict[str, str]
    head_dim: int | None
    axes: dict[str, tuple[Axis | None, ...]]
    shapes: dict[str, tuple[int, ...]]
    missing: dict[str, str] = field(default_factory=dict)
    scaled_embeddings: bool = False

    def groups(self, kind: Kind) -> dict[str, str]:
        """Return the modules that own units of a kind, in the order of the model, each with its size's name."""
        all_axes = (axis for axes in self.axes.values() for axis in axes)
        return {axis.group: axis.size for axis in all_axes if axis is not None and axis.kind == kind}

    @property
    def heads_per_group(self) -> int:
        """Number of query heads that read the same key and value head."""
        return self.sizes["num_attention_heads"] // self.sizes["num_key_value_heads"]

    def entries(self, axis: Axis, units: Sequence[int]) -> Tensor:
        """Return the indices of a dimension [D] that belong to units of it."""
        entries: list[int] = []
        for run in axis.runs:
            chosen = sorted({unit // self.heads_per_group for unit in units}) if run.by_group else units
            entries += [run.start + unit * run.size + i for unit in chosen for i in range(run.size)]
        return torch.tensor(entries, dtype=torch.long)

    def narrow(self, value: Tensor, axes: Sequence[Axis | None], kept: KeptUnits) -> Tensor:
        """Return the part of a weight that belongs to the kept units."""
        for dim, axis in enumerate(axes):
            units = None if axis is None else _units_of(axis, kept)
            if axis is None or units is None:
                continue
            if isinstance(units[0], list):  # other neurons of each expert; the experts, dimension 0, were chosen before
                indices = [self.entries(axis, part).to(value.device) for part in cast(list[list[int]], units)]
                value = torch.stack([value[i].index_select(dim - 1, index) for i, index in enumerate(indices)])
            else:
                value = value.index_select(dim, self.entries(axis, cast(list[int], units)).to(value.device))
        return value


def _units_of(axis: Axis, kept: KeptUnits) -> list[int] | list[list[int]] | None:
    """Return the kept units of an axis; None keeps all."""
    if axis.kind == "channels":
        return kept.channels
    units: Mapping[str, list] | None = getattr(kept, axis.kind)
    return (units or {}).get(axis.group)
