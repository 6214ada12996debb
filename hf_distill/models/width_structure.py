"""Finds which dimensions of a model's weights are hidden channels, neurons, heads and experts.

A size of the config is doubled, the model is built anew without memory for its weights (on the meta device), and the
dimensions that changed are those of the size. Names of modules and parameters are not read, and a size that occurs
twice (such as an `intermediate_size` that equals the hidden size) is not confused.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import DistillError
from .model_types import CAUSAL, unmeasured_type_of, unwrap_parallel

Kind = Literal["channels", "neurons", "heads", "experts"]
NEURON_SIZES = ("intermediate_size", "moe_intermediate_size")
KIND_OF_SIZE: dict[str, Kind] = {
    "hidden_size": "channels",
    **dict.fromkeys(NEURON_SIZES, "neurons"),
    "num_attention_heads": "heads",
    "num_experts": "experts",
}
_Shapes = dict[str, tuple[int, ...]]


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
    head_dim: size of a query or key head; None if no heads were found
    axes:     name of a parameter -> an axis for each of its dimensions, None for dimensions that keep their size
    missing:  name of a size -> why its units cannot be pruned
    """

    sizes: dict[str, int]
    head_dim: int | None
    axes: dict[str, tuple[Axis | None, ...]]
    missing: dict[str, str] = field(default_factory=dict)

    def groups(self, kind: Kind) -> dict[str, str]:
        """Return the modules that own units of a kind, in the order of the model, each with its size's name."""
        found = (axis for axes in self.axes.values() for axis in axes)
        return {axis.group: axis.size for axis in found if axis is not None and axis.kind == kind}


def check_prunable(model: nn.Module) -> PreTrainedModel:
    """Return the transformers model inside parallel wrappers.

    Raises:
        DistillError: its units cannot be pruned: it is no causal language model, is quantized, or has adapters.
    """
    inner = unwrap_parallel(model)
    if hasattr(inner, "peft_config"):
        raise DistillError(
            "Units of a model with adapters cannot be pruned: merge the adapters first (`model.merge_and_unload()`), "
            "or pass the base model."
        )
    if not isinstance(inner, PreTrainedModel) or unmeasured_type_of(inner).name != CAUSAL.name:
        raise DistillError(
            f"{type(inner).__name__} is no causal language model of transformers: only layers can be removed from "
            "models of other types (keep_layers, cut_student)."
        )
    if getattr(inner, "quantization_method", None) is not None:
        raise DistillError(
            f"{type(inner).__name__} is quantized, and its weights cannot be divided into units: load it in bfloat16 "
            "or float32 to prune it, and quantize the student."
        )
    return inner


def find_width_structure(model: PreTrainedModel) -> WidthStructure:
    """Find the units of a causal language model; its weights are not read.

    Args:
        model: a transformers model, without wrappers.
    """
    own = _shapes(cast(nn.Module, model))
    names = {name for name, _ in cast(nn.Module, model).named_parameters(remove_duplicate=False)}
    owners = {name: _owner(cast(nn.Module, model), name) for name in names}
    config = with_head_dim(model.config)
    text = config.get_text_config()
    axes: dict[str, list[Axis | None]] = {name: [None] * len(own[name]) for name in names}
    sizes: dict[str, int] = {}
    missing: dict[str, str] = {}
    for size in KIND_OF_SIZE:
        value = getattr(text, size, None)
        if not value:
            missing[size] = f"its config has no `{size}`"
            continue
        try:
            found = _heads(model, config, own) if size == "num_attention_heads" else _plain(model, config, own, size)
            grouped = _with_groups(model, found, size, owners)
            _add(axes, grouped)
        except DistillError as error:
            missing[size] = str(error)
        else:
            sizes[size] = value
    if "hidden_size" in sizes and "num_attention_heads" not in sizes:
        missing["hidden_size"] = "the size of its heads follows the hidden size"
        del sizes["hidden_size"]
    groups = getattr(text, "num_key_value_heads", None) or sizes.get("num_attention_heads")
    if "num_attention_heads" in sizes:
        sizes["num_key_value_heads"] = cast(int, groups)
    return WidthStructure(sizes, getattr(text, "head_dim", None), {k: tuple(v) for k, v in axes.items()}, missing)


def with_head_dim(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config in which the size of a head is explicit, so that other sizes do not change it."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads, width = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if getattr(text, "head_dim", None) is None and heads and width:
        text.head_dim = width // heads
    return config


def _shapes(model: nn.Module) -> _Shapes:
    """Return the shapes of all parameters and buffers; those that several modules share have each name."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _probe(model: PreTrainedModel, config: PretrainedConfig, factors: Mapping[str, int], own: _Shapes) -> _Shapes:
    """Return the shapes of a model whose config has some sizes multiplied.

    Raises:
        DistillError: there is no such model, or it has other weights.
    """
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for size, factor in factors.items():
        setattr(text, size, getattr(text, size) * factor)
    changed = " and ".join(f"`{size}`" for size in factors)
    try:
        with torch.device("meta"), no_init_weights():
            shapes = _shapes(cast(nn.Module, type(model)(config)))
    except Exception as error:
        raise DistillError(f"a model with another {changed} cannot be built ({error})") from error
    if other := sorted(set(shapes) ^ set(own)):
        raise DistillError(f"{changed} decides which weights there are ({other[0]}, ...), not how large they are")
    return shapes


class _Place(NamedTuple):
    """A dimension of a parameter."""

    name: str
    dim: int


def _changes(shapes: _Shapes, own: _Shapes) -> dict[_Place, int]:
    """Return by how much each dimension grew."""
    return {
        _Place(name, dim): size - own[name][dim]
        for name, shape in shapes.items()
        for dim, size in enumerate(shape)
        if size != own[name][dim]
    }


def _plain(model: PreTrainedModel, config: PretrainedConfig, own: _Shapes, size: str) -> dict[_Place, tuple[Run, ...]]:
    """Find the dimensions of hidden channels, neurons or experts.

    Raises:
        DistillError: there are none, or one of them is made in another way.
    """
    value = getattr(config.get_text_config(), size)
    parameters = dict(cast(nn.Module, model).named_parameters(remove_duplicate=False))
    found: dict[_Place, tuple[Run, ...]] = {}
    for place, change in _changes(_probe(model, config, {size: 2}, own), own).items():
        length = own[place.name][place.dim]
        count = length // value
        is_whole = length == count * value == change
        if place.name not in parameters or not is_whole or count > (2 if size in NEURON_SIZES else 1):
            raise DistillError(
                f"dimension {place.dim} of {place.name} is {length} and grows by {change} with `{size}` ({value})"
            )
        module = cast(nn.Module, model).get_submodule(place.name.rpartition(".")[0])
        if count == 2 and getattr(module, "is_concatenated", True) is False:  # gate 0, up 0, gate 1, up 1, ...
            found[place] = (Run(0, 2),)
        else:  # a gate and what it multiplies may be in one weight, one after the other
            found[place] = tuple(Run(i * value, 1) for i in range(count))
    if not found:
        raise DistillError(f"none of its weights changes with `{size}`")
    return found


def _heads(model: PreTrainedModel, config: PretrainedConfig, own: _Shapes) -> dict[_Place, tuple[Run, ...]]:
    """Find the dimensions of query heads and key-value groups.

    Raises:
        DistillError: there are none, or one of them is made in another way.
    """
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    by_heads = _changes(_probe(model, config, {"num_attention_heads": 2}, own), own)
    both = by_heads
    if groups is not None:
        both = _changes(_probe(model, config, {"num_attention_heads": 2, "num_key_value_heads": 2}, own), own)
    parameters = dict(cast(nn.Module, model).named_parameters(remove_duplicate=False))
    found: dict[_Place, tuple[Run, ...]] = {}
    for place, change in both.items():
        length, of_heads = own[place.name][place.dim], by_heads.get(place, 0)
        of_groups = change - of_heads
        per_head, per_group = of_heads // heads, of_groups // (groups or heads)
        runs: tuple[Run, ...] | None = None
        if place.name in parameters and length == change == per_head * heads + per_group * (groups or heads):
            if not per_group:
                runs = (Run(0, per_head),)
            elif not per_head and per_group != 2 * text.head_dim:
                runs = (Run(0, per_group, by_group=True),)
            elif per_group == 2 * text.head_dim and per_head in (0, text.head_dim):  # queries, keys, values
                keys, values = of_heads, of_heads + of_groups // 2
                queries = (Run(0, per_head),) if per_head else ()
                runs = (*queries, Run(keys, text.head_dim, True), Run(values, text.head_dim, True))
        if runs is None:
            raise DistillError(
                f"dimension {place.dim} of {place.name} is {length} and grows by {change} with the numbers of heads"
            )
        found[place] = runs
    if not found:
        raise DistillError("none of its weights changes with `num_attention_heads`: its heads become narrower instead")
    return found


def _owner(model: nn.Module, name: str) -> str:
    """Return the module whose units a weight belongs to: around a linear layer or norm, or that has it itself."""
    module = name.rpartition(".")[0]
    return module.rpartition(".")[0] if name.endswith((".weight", ".bias")) else module


def _with_groups(
    model: PreTrainedModel, found: Mapping[_Place, tuple[Run, ...]], size: str, owners: Mapping[str, str]
) -> dict[_Place, Axis]:
    """Return the axes of dimensions: which module owns their units.

    Raises:
        DistillError: a module has weights that make the units, and none that reads them.
    """
    kind = KIND_OF_SIZE[size]
    if kind == "channels":
        return {place: Axis(kind, "", size, runs) for place, runs in found.items()}
    axes, last_dims = {}, defaultdict(list)
    for place, runs in found.items():
        group = owners[place.name]
        if kind == "experts" and not place.name.endswith((".weight", ".bias")):
            group = group.rpartition(".")[0]  # the tensors of all experts stand in a module beside the router
        axes[place] = Axis(kind, group, size, runs)
        last_dims[group].append((place.name, place.dim))
    if kind in ("neurons", "heads"):
        shapes = _shapes(cast(nn.Module, model))
        for group, places in last_dims.items():
            if not any(len(shapes[name]) > 1 and dim == len(shapes[name]) - 1 for name, dim in places):
                names = ", ".join(name for name, _ in places)
                raise DistillError(f"no weight in `{group}` reads the units that {names} make")
    return axes


def _add(axes: dict[str, list[Axis | None]], found: Mapping[_Place, Axis]) -> None:
    """Add the axes of a size.

    Raises:
        DistillError: a dimension changes with another size too.
    """
    for place, axis in found.items():
        if (other := axes[place.name][place.dim]) is not None:
            raise DistillError(f"dimension {place.dim} of {place.name} changes with `{axis.size}` and `{other.size}`")
    for place, axis in found.items():
        axes[place.name][place.dim] = axis
