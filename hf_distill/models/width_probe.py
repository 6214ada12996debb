"""Finds which dimensions of a model's weights are hidden channels, neurons, heads and experts, from its config.

A size of the config is doubled, the model is built anew without memory for its weights (on the meta device), and the
dimensions that changed are those of the size. There is no table of the names of modules, and a size that occurs twice
(such as an `intermediate_size` that equals the hidden size) is not confused.
"""

import copy
from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import DistillError
from .width_axes import KIND_OF_SIZE, NEURON_SIZES, Axis, Run, WidthStructure

_CONFIG_NAMES = {"num_experts": ("num_experts", "num_local_experts", "n_routed_experts")}  # sizes with several names
_Runs = dict["_Place", tuple[Run, ...]]


class _Place(NamedTuple):
    """A dimension of a parameter."""

    name: str
    dim: int


class _Probe:
    """Models of a class with other sizes, on the meta device.

    Attributes:
        config: the config, with an explicit size of a head.
        model:  a model of this config.
        weights: names of what a checkpoint contains.
        shapes: shapes of its parameters and buffers; those that several modules share have each name.
    """

    def __init__(self, model_class: type[PreTrainedModel], config: PretrainedConfig):
        self.model_class = model_class
        self.config = with_head_dim(config)
        self.text = self.config.get_text_config()
        self.model = build_meta(model_class, self.config)
        self.weights = set(self.model.state_dict())
        self.shapes = _shapes(self.model)

    def changes(self, *sizes: str) -> dict[_Place, int]:
        """Return by how much each dimension grows if some sizes of the config are doubled.

        Raises:
            DistillError: there is no such model, or it has other weights.
        """
        config = copy.deepcopy(self.config)
        text = config.get_text_config()
        for size in sizes:
            setattr(text, size, getattr(text, size) * 2)
        changed = " and ".join(f"`{size}`" for size in sizes)
        try:
            shapes = _shapes(build_meta(self.model_class, config))
        except Exception as error:
            raise DistillError(f"a model with another {changed} cannot be built ({error})") from error
        if other := sorted(set(shapes) ^ set(self.shapes)):
            raise DistillError(f"{changed} decides which weights there are ({other[0]}, ...), not how large they are")
        return {
            _Place(name, dim): length - self.shapes[name][dim]
            for name, shape in shapes.items()
            for dim, length in enumerate(shape)
            if length != self.shapes[name][dim]
        }


def probe_structure(model_class: type[PreTrainedModel], config: PretrainedConfig) -> WidthStructure:
    """Find the units of the models of a class that have a config.

    Args:
        model_class: class of the model.
        config: its config.
    """
    probe = _Probe(model_class, config)
    axes: dict[str, list[Axis | None]] = {name: [None] * len(probe.shapes[name]) for name in probe.weights}
    sizes: dict[str, int] = {}
    names: dict[str, str] = {}
    missing: dict[str, str] = {}
    for size in KIND_OF_SIZE:
        possible = _CONFIG_NAMES.get(size, (size,))
        names[size] = next((name for name in possible if getattr(probe.text, name, None)), "")
        if not names[size]:
            missing[size] = f"its config has no `{size}`"
            continue
        try:
            runs_by_place = _heads(probe) if size == "num_attention_heads" else _plain(probe, size, names[size])
            _add(axes, _with_groups(probe, runs_by_place, size))
            sizes[size] = getattr(probe.text, names[size])
        except DistillError as error:
            missing[size] = str(error)
    if "hidden_size" in sizes and "num_attention_heads" not in sizes:
        missing["hidden_size"] = f"the size of a head follows it ({missing['num_attention_heads']})"
        del sizes["hidden_size"]
    if "num_attention_heads" in sizes:
        sizes["num_key_value_heads"] = getattr(probe.text, "num_key_value_heads", None) or sizes["num_attention_heads"]
    head_dim = getattr(probe.text, "head_dim", None)
    parameters = {name for name, _ in probe.model.named_parameters(remove_duplicate=False)}
    axes = {name: value for name, value in axes.items() if name in parameters or any(value)}
    shapes = {name: probe.shapes[name] for name in axes}
    return WidthStructure(sizes, names, head_dim, {k: tuple(v) for k, v in axes.items()}, shapes, missing)


def build_meta(model_class: type[PreTrainedModel], config: PretrainedConfig) -> nn.Module:
    """Build a model whose weights take no memory."""
    with torch.device("meta"), no_init_weights():
        return cast(nn.Module, model_class(config))


def with_head_dim(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a config in which the size of a head is explicit, so that other sizes do not change it."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    heads, width = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    if getattr(text, "head_dim", None) is None and heads and width:
        text.head_dim = width // heads
    return config


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _plain(probe: _Probe, size: str, name_in_config: str) -> _Runs:
    """Find the dimensions of hidden channels, neurons or experts.

    Raises:
        DistillError: there are none, or one of them is made in another way.
    """
    value = getattr(probe.text, name_in_config)
    runs_by_place: _Runs = {}
    for place, change in probe.changes(name_in_config).items():
        length = probe.shapes[place.name][place.dim]
        count = length // value
        is_whole = length == count * value == change
        if place.name not in probe.weights or not is_whole or count > (2 if size in NEURON_SIZES else 1):
            raise DistillError(
                f"dimension {place.dim} of {place.name} is {length} and grows by {change} when `{size}` ({value}) is "
                "doubled"
            )
        module = probe.model.get_submodule(place.name.rpartition(".")[0])
        if count == 2 and getattr(module, "is_concatenated", True) is False:  # gate 0, up 0, gate 1, up 1, ...
            runs_by_place[place] = (Run(0, 2),)
        else:  # a gate and what it multiplies may be in one weight, one after the other
            runs_by_place[place] = tuple(Run(i * value, 1) for i in range(count))
    if not runs_by_place:
        raise DistillError(f"none of its weights changes with `{size}`")
    return runs_by_place


def _heads(probe: _Probe) -> _Runs:
    """Find the dimensions of query heads and key-value groups.

    Raises:
        DistillError: there are none, or one of them is made in another way.
    """
    by_heads = both = probe.changes("num_attention_heads")
    heads, groups = probe.text.num_attention_heads, getattr(probe.text, "num_key_value_heads", None)
    if groups is not None:
        both = probe.changes("num_attention_heads", "num_key_value_heads")
    runs_by_place: _Runs = {}
    for place, change in both.items():
        length, of_heads = probe.shapes[place.name][place.dim], by_heads.get(place, 0)
        per_head, per_group = of_heads // heads, (change - of_heads) // (groups or heads)
        is_whole = length == change == per_head * heads + per_group * (groups or heads)
        runs = _head_runs(per_head, per_group, of_heads, change, probe.text.head_dim)
        if place.name not in probe.weights or not is_whole or runs is None:
            raise DistillError(
                f"dimension {place.dim} of {place.name} is {length} and grows by {change} when the numbers of heads "
                "are doubled"
            )
        runs_by_place[place] = runs
    if not runs_by_place:
        raise DistillError("none of its weights changes with `num_attention_heads`: its heads become narrower instead")
    return runs_by_place


def _head_runs(per_head: int, per_group: int, of_heads: int, length: int, head_dim: int) -> tuple[Run, ...] | None:
    """Return where heads are in a dimension that has some entries for each head and group; None: it is not known."""
    if not per_group:
        return (Run(0, per_head),)
    if per_group != 2 * head_dim:
        return None if per_head else (Run(0, per_group, by_group=True),)
    if per_head not in (0, head_dim):
        return None
    queries = (Run(0, per_head),) if per_head else ()  # queries, keys, and values of all heads, one after the other
    return (*queries, Run(of_heads, head_dim, True), Run((of_heads + length) // 2, head_dim, True))


def _with_groups(probe: _Probe, runs_by_place: _Runs, size: str) -> dict[_Place, Axis]:
    """Return the axes of dimensions: which module owns their units.

    Raises:
        DistillError: a module has weights that make the units, and none that reads them.
    """
    kind = KIND_OF_SIZE[size]
    axes: dict[_Place, Axis] = {}
    places = defaultdict(list)
    for place, runs in runs_by_place.items():
        module, _, last = place.name.rpartition(".")
        # A linear layer, norm or router is a part of the module around it; other modules have weights themselves.
        group = module.rpartition(".")[0] if last in ("weight", "bias") or kind == "experts" else module
        axes[place] = Axis(kind, "" if kind == "channels" else group, size, runs)
        places[group].append(place)
    if kind in ("neurons", "heads"):
        for group, members in places.items():
            if not any(reads_units(probe.model, place.name, place.dim) for place in members):
                names = ", ".join(place.name for place in members)
                raise DistillError(f"no weight in `{group}` reads the units that {names} make")
    return axes


def reads_units(model: nn.Module, name: str, dim: int) -> bool:
    """Whether a dimension of a weight is that of its inputs."""
    owner = model.get_submodule(name.rpartition(".")[0])
    rank = len(getattr(owner, name.rpartition(".")[2]).shape)
    is_transposed = bool(getattr(owner, "is_transposed", False))
    return rank > 1 and not isinstance(owner, nn.Embedding) and dim == rank - 1 - is_transposed


def _add(axes: dict[str, list[Axis | None]], new_axes: Mapping[_Place, Axis]) -> None:
    """Add the axes of a size.

    Raises:
        DistillError: a dimension changes with another size too.
    """
    for place, axis in new_axes.items():
        if (other := axes[place.name][place.dim]) is not None:
            raise DistillError(f"dimension {place.dim} of {place.name} changes with `{axis.size}` and `{other.size}`")
    for place, axis in new_axes.items():
        axes[place.name][place.dim] = axis
