"""Width pruning: students that are their teacher with fewer hidden channels, neurons, heads or experts."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DistillError
from .importance import Importance
from .pruned_shape import KeptUnits, PrunedShape
from .pruning import find_cuts, prune_config, student_of
from .width_structure import KIND_OF_SIZE, Axis, Kind, WidthStructure, check_prunable, find_width_structure


@dataclass(frozen=True)
class PrunedStudent:
    """A student that was pruned from its teacher, and which units of the teacher it has."""

    model: PreTrainedModel
    kept: KeptUnits


def prune_student(teacher: nn.Module, shape: PrunedShape, importance: Importance) -> PrunedStudent:
    """Copy a teacher with its most important units only; the teacher is not changed.

    Args:
        teacher: a causal language model of transformers.
        shape: sizes of the student.
        importance: see `measure_importance`; of this teacher with all its blocks.

    Returns:
        a model of the teacher's class in training mode, which `from_pretrained` loads, and the units it consists of.

    Raises:
        DistillError: a size is not possible, or the teacher has no such units.
    """
    inner = check_prunable(teacher)
    kept = select_units(inner, shape, importance)
    return PrunedStudent(keep_units(inner, kept), kept)


def pruned_config(teacher: PreTrainedModel, shape: PrunedShape) -> PretrainedConfig:
    """Return the config of a student of a shape; no weights are read, so that the teacher may be on the meta device.

    Raises:
        DistillError: see `prune_student`.
    """
    structure = find_width_structure(check_prunable(teacher))
    sizes = {name: size for name, size in shape.widths().items() if _check_size(teacher, structure, name, size)}
    config = teacher.config
    for cut in find_cuts(teacher, {None: shape.layers}) if shape.layers is not None else []:
        config = prune_config(config, cut.keep, cut.depth)
    return _narrow_config(config, structure, sizes)


def select_units(teacher: PreTrainedModel, shape: PrunedShape, importance: Importance) -> KeptUnits:
    """Choose the units that a student of a shape keeps: the most important of each module.

    Raises:
        DistillError: see `prune_student`.
    """
    structure = importance.structure
    widths = {name: size for name, size in shape.widths().items() if _check_size(teacher, structure, name, size)}
    layers = None
    if shape.layers is not None:
        (cut,) = find_cuts(teacher, {None: shape.layers})
        layers = cut.keep
    is_kept = _in_kept_layers(teacher, layers)
    channels = None
    if "hidden_size" in widths:
        channels = _top(cast(Tensor, importance.channels), widths["hidden_size"])
    heads = {}
    if "num_attention_heads" in widths:
        heads = {
            group: _top_heads(scores, structure, widths["num_attention_heads"])
            for group, scores in importance.heads.items()
            if is_kept(group)
        }
    experts = {}
    if "num_experts" in widths:
        scores = importance.experts
        experts = {group: _top(scores[group], widths["num_experts"]) for group in scores if is_kept(group)}
    neurons: dict[str, list[int] | list[list[int]]] = {}
    for group, size in structure.groups("neurons").items():
        if size not in widths or not is_kept(group):
            continue
        scores_of_group = importance.neurons[group]
        if scores_of_group.dim() == 1:
            neurons[group] = _top(scores_of_group, widths[size])
        else:
            chosen = experts.get(group.rpartition(".")[0], range(len(scores_of_group)))
            neurons[group] = [_top(scores_of_group[expert], widths[size]) for expert in chosen]
    return KeptUnits(layers, channels, neurons or None, heads or None, experts or None)


def keep_units(teacher: nn.Module, kept: KeptUnits) -> PreTrainedModel:
    """Copy a teacher with some of its units, as `prune_student` chose them earlier.

    Args:
        teacher: the model whose units are named.
        kept: the units.

    Raises:
        DistillError: the teacher has no such units, or the class of its config refuses the sizes.
    """
    inner = check_prunable(teacher)
    structure = find_width_structure(inner)
    cuts = find_cuts(inner, {None: kept.layers}) if kept.layers is not None else []
    sizes = _sizes_of(kept, structure, _in_kept_layers(inner, kept.layers))
    config = inner.config
    for cut in cuts:
        config = prune_config(config, cut.keep, cut.depth)
    config = _narrow_config(config, structure, sizes)
    axes, state = structure.axes, inner.state_dict()
    for cut in cuts:
        axes, state = cut.rename(axes), cut.rename(state)
    narrow = {name: _narrow(value, axes.get(name, ()), structure, kept) for name, value in state.items()}
    return student_of(inner, config, narrow, cuts)


def _check_size(teacher: PreTrainedModel, structure: WidthStructure, name: str, size: int) -> bool:
    """Check a size of a student; return whether it is smaller than the teacher's.

    Raises:
        DistillError: it is not possible.
    """
    if name not in structure.sizes:
        others = ", ".join(f"{key} ({structure.sizes[key]})" for key in KIND_OF_SIZE if key in structure.sizes)
        raise DistillError(
            f"{name} of {type(teacher).__name__} cannot be pruned: {structure.missing[name]}. The sizes that can be: "
            f"{others or 'none'}."
        )
    own = structure.sizes[name]
    if not 0 < size <= own:
        raise DistillError(f"{name} is {size}: give a number from 1 to {own}, the teacher's.")
    if name == "num_attention_heads":
        group = own // structure.sizes["num_key_value_heads"]
        if size % group:
            raise DistillError(
                f"num_attention_heads is {size}: the teacher's {own} heads are in groups of {group} with one key and "
                f"value head, and groups are kept whole. Give a multiple of {group}, up to {own}."
            )
    if name == "num_experts":
        chosen = getattr(teacher.config.get_text_config(), "num_experts_per_tok", None) or 1
        if size < chosen:
            raise DistillError(f"num_experts is {size}, and each token needs {chosen} experts: give {chosen} to {own}.")
    return size < own


def _in_kept_layers(teacher: PreTrainedModel, layers: Sequence[int] | None) -> Callable[[str], bool]:
    """Return a function that says whether a module remains when only some blocks are kept."""
    if layers is None:
        return lambda group: True
    (cut,) = find_cuts(teacher, {None: layers})
    return lambda group: bool(cut.rename({f"{group}.": None}))


def _top(scores: Tensor, count: int) -> list[int]:
    """Return the indices of the largest scores [N], ascending; of equal scores, the first."""
    return sorted(torch.argsort(scores.double().cpu(), descending=True, stable=True)[:count].tolist())


def _top_heads(scores: Tensor, structure: WidthStructure, count: int) -> list[int]:
    """Return the heads of the key-value groups with the largest sums of scores [A]."""
    groups = structure.sizes["num_key_value_heads"]
    size = len(scores) // groups
    best = _top(scores.unflatten(0, (groups, size)).sum(1), count // size)
    return [group * size + i for group in best for i in range(size)]


def _sizes_of(kept: KeptUnits, structure: WidthStructure, is_kept: Callable[[str], bool]) -> dict[str, int]:
    """Return the sizes of a student that has some units, by their names in the config.

    Raises:
        DistillError: they are units of another model, or not as many in all modules.
    """
    units_of: dict[Kind, Mapping[str, list]] = {"channels": {} if kept.channels is None else {"": kept.channels}}
    units_of |= {"neurons": kept.neurons or {}, "heads": kept.heads or {}, "experts": kept.experts or {}}
    sizes: dict[str, int] = {}
    for kind, units in units_of.items():
        groups = {group: size for group, size in structure.groups(kind).items() if is_kept(group)}
        for size in {groups.get(group, "") for group in units}:
            expected = {group for group in groups if groups[group] == size}
            lists = [units[group] for group in expected & set(units)]
            flat = [part for one in lists for part in (one if one and isinstance(one[0], list) else [one])]
            counts = {len(part) for part in flat}
            limit = structure.sizes.get(size, 0)
            is_valid = all(part == sorted(set(part)) and part and part[0] >= 0 and part[-1] < limit for part in flat)
            if expected - set(units) or set(units) - set(groups) or len(counts) != 1 or not is_valid:
                raise DistillError(
                    f"The kept {kind} are not units of this teacher: it has {limit} in each of {len(expected)} modules "
                    f"({', '.join(sorted(expected)[:2]) or 'none'}), and as many must be kept in each. Use the kept "
                    "units of the same teacher."
                )
            (sizes[size],) = counts
    return sizes


def _narrow_config(config: PretrainedConfig, structure: WidthStructure, sizes: Mapping[str, int]) -> PretrainedConfig:
    """Return the config of a student.

    Raises:
        DistillError: the class of the config refuses its sizes.
    """
    if not sizes:
        return config
    config = copy.deepcopy(config)
    text = config.get_text_config()
    for name, size in sizes.items():
        setattr(text, name, size)
    if "num_attention_heads" in sizes and getattr(text, "num_key_value_heads", None) is not None:
        per_group = structure.sizes["num_attention_heads"] // structure.sizes["num_key_value_heads"]
        text.num_key_value_heads = sizes["num_attention_heads"] // per_group
    if getattr(text, "head_dim", None) is None and text.hidden_size // text.num_attention_heads != structure.head_dim:
        text.head_dim = structure.head_dim
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:
        given = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise DistillError(
            f"{type(config).__name__} does not allow these sizes ({given}), so that the student could not be loaded: "
            f"{error}"
        ) from error
    return config


def _narrow(value: Tensor, axes: Sequence[Axis | None], structure: WidthStructure, kept: KeptUnits) -> Tensor:
    """Return the part of a weight that belongs to the kept units."""
    for dim, axis in enumerate(axes):
        if axis is None:
            continue
        units = _units_of(axis, kept)
        if units is None:
            continue
        if isinstance(units[0], list):  # other neurons of each expert; the experts, which are dimension 0, come first
            indices = [_entries(axis, structure, cast(list[int], part)).to(value.device) for part in units]
            parts = [value[i].index_select(dim - 1, index) for i, index in enumerate(indices)]
            value = torch.stack(parts)
        else:
            value = value.index_select(dim, _entries(axis, structure, cast(list[int], units)).to(value.device))
    return value


def _units_of(axis: Axis, kept: KeptUnits) -> list[int] | list[list[int]] | None:
    """Return the kept units of an axis; None keeps all."""
    if axis.kind == "channels":
        return kept.channels
    units: Mapping[str, list] | None = getattr(kept, axis.kind)
    return (units or {}).get(axis.group)


def _entries(axis: Axis, structure: WidthStructure, units: list[int]) -> Tensor:
    """Return the indices of a dimension that belong to units."""
    entries: list[int] = []
    for run in axis.runs:
        chosen = units
        if run.by_group:
            per_group = structure.sizes["num_attention_heads"] // structure.sizes["num_key_value_heads"]
            chosen = sorted({unit // per_group for unit in units})
        entries += [run.start + unit * run.size + i for unit in chosen for i in range(run.size)]
    return torch.tensor(entries)
