"""Width pruning: students that are their teacher with fewer hidden channels, neurons, heads or experts."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import DistillError, collect_errors
from .blocks import find_blocks
from .importance import Importance
from .pruned_shape import KeptUnits, PrunedShape
from .pruning import find_cuts, prune_config, student_of
from .width_axes import KIND_OF_SIZE, Kind, WidthStructure
from .width_structure import check_prunable, find_width_structure


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
        importance: see `measure_importance`; of this teacher with all its layers.

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

    Args:
        teacher: see `prune_student`.
        shape: sizes of the student.

    Returns:
        a config of the teacher's class.

    Raises:
        DistillError: see `prune_student`.
    """
    structure = find_width_structure(check_prunable(teacher))
    sizes = _smaller_widths(teacher, structure, shape)
    config = teacher.config
    for cut in find_cuts(teacher, {None: shape.layers}) if shape.layers is not None else []:
        config = prune_config(config, cut.keep, cut.depth)
    return _narrow_config(config, structure, sizes)


def select_units(teacher: PreTrainedModel, shape: PrunedShape, importance: Importance) -> KeptUnits:
    """Choose the units that a student of a shape keeps: the most important of each module.

    Args:
        teacher: see `prune_student`.
        shape: sizes of the student.
        importance: importance of the units; see `measure_importance`.

    Returns:
        the units to keep.

    Raises:
        DistillError: see `prune_student`.
    """
    structure = importance.structure
    if find_width_structure(teacher) != structure:
        raise DistillError("The importance was measured on another model than this teacher: measure it on the teacher.")
    widths = _smaller_widths(teacher, structure, shape)
    layers = None
    if shape.layers is not None:
        (cut,) = find_cuts(teacher, {None: shape.layers})
        layers = cut.keep
    is_kept = _in_kept_layers(teacher, layers)

    def scores(kind: Kind) -> Iterator[tuple[str, int, Tensor]]:
        """Yield the modules in kept layers whose units are chosen, with their number of units and their scores."""
        for group, size in structure.groups(kind).items():
            if size in widths and is_kept(group):
                yield group, widths[size], importance.scores(kind, group)

    channels = next((_top(values, count) for _, count, values in scores("channels")), None)
    heads = {group: _top_heads(values, structure, count) for group, count, values in scores("heads")}
    experts = {group: _top(values, count) for group, count, values in scores("experts")}
    neurons: dict[str, list[int] | list[list[int]]] = {}
    for group, count, values in scores("neurons"):
        if values.dim() == 1:
            neurons[group] = _top(values, count)
        else:
            chosen = experts.get(group.rpartition(".")[0], range(len(values)))
            neurons[group] = [_top(values[expert], count) for expert in chosen]
    return KeptUnits(layers, channels, neurons or None, heads or None, experts or None)


def keep_units(teacher: nn.Module, kept: KeptUnits) -> PreTrainedModel:
    """Copy a teacher with some of its units, as `prune_student` chose them earlier.

    Args:
        teacher: the model whose units are named.
        kept: the units.

    Returns:
        a model of the teacher's class in training mode, with the sizes of the units in its config.

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
    narrow = {name: structure.narrow(value, axes.get(name, ()), kept) for name, value in state.items()}
    student = student_of(inner, config, narrow, cuts, kept.channels)
    if kept.channels is not None and structure.scaled_embeddings:
        _keep_embedding_scale(student, structure, (structure.sizes["hidden_size"] / len(kept.channels)) ** 0.5)
    return student


def _smaller_widths(teacher: PreTrainedModel, structure: WidthStructure, shape: PrunedShape) -> dict[str, int]:
    """Return the sizes of a shape that are smaller than the teacher's.

    Raises:
        DistillError: sizes are not possible. The message has all of them.
    """
    smaller: dict[str, int] = {}
    problems: list[str] = []
    for name, size in shape.widths().items():
        with collect_errors(problems):
            if _check_size(teacher, structure, name, size):
                smaller[name] = size
    if problems:
        raise DistillError(" ".join(problems))
    return smaller


def _check_size(teacher: PreTrainedModel, structure: WidthStructure, name: str, size: int) -> bool:
    """Check a size of a student; return whether it is smaller than the teacher's.

    Raises:
        DistillError: it is not possible.
    """
    if name not in structure.sizes:
        others = ", ".join(f"{key} ({structure.sizes[key]})" for key in KIND_OF_SIZE if key in structure.sizes)
        raise DistillError(
            f"{name} of {type(teacher).__name__} cannot be pruned: {structure.missing[name]}. "
            + (
                f"The sizes that can be: {others}."
                if others
                else "Only layers of this model can be removed (keep_layers)."
            )
        )
    teacher_size = structure.sizes[name]
    if not 0 < size <= teacher_size:
        raise DistillError(f"{name} is {size}: give a number from 1 to {teacher_size}, the teacher's.")
    if name == "num_attention_heads":
        group = structure.heads_per_group
        if size % group:
            raise DistillError(
                f"num_attention_heads is {size}: the teacher's {teacher_size} heads are in groups of {group} with one "
                f"key and value head, and groups are kept whole. Give a multiple of {group}, up to {teacher_size}."
            )
    if _has_expert_tensors(structure) and KIND_OF_SIZE[name] in ("channels", "neurons"):
        multiple = 16 // teacher.dtype.itemsize
        if size % multiple and teacher_size % multiple == 0:
            raise DistillError(
                f"{name} is {size}: the experts are multiplied in groups, for which rows of weights must be multiples "
                f"of 16 bytes. Give a multiple of {multiple}."
            )
    if name == "num_experts":
        chosen = getattr(teacher.config.get_text_config(), "num_experts_per_tok", None) or 1
        if size < chosen:
            raise DistillError(
                f"num_experts is {size}, and each token needs {chosen} experts: give {chosen} to {teacher_size}."
            )
    return size < teacher_size


def _has_expert_tensors(structure: WidthStructure) -> bool:
    """Whether the weights of all experts of a layer are in one tensor."""
    return any(len(axes) == 3 and axes[0] is not None and axes[0].kind == "experts" for axes in structure.axes.values())


def _in_kept_layers(teacher: PreTrainedModel, layers: Sequence[int] | None) -> Callable[[str], bool]:
    """Return a function that says whether a module remains when only some layers are kept."""
    if layers is None:
        return lambda group: True
    (cut,) = find_cuts(teacher, {None: layers})
    return lambda group: not group or bool(cut.rename({f"{group}.": None}))


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
            is_valid = all(_are_units(part, kind, limit, structure) for part in flat)
            if expected - set(units) or set(units) - set(groups) or len(counts) != 1 or not is_valid:
                raise DistillError(
                    f"The kept {kind} are not units of this teacher: it has {limit} in each of {len(expected)} modules "
                    f"({', '.join(sorted(expected)[:2]) or 'none'}), and as many must be kept in each. Use the kept "
                    "units of the same teacher."
                )
            (sizes[size],) = counts
    return sizes


def _are_units(indices: list[int], kind: Kind, limit: int, structure: WidthStructure) -> bool:
    """Whether indices are ascending and those of units; heads must be whole groups."""
    if not indices or indices != sorted(set(indices)) or indices[0] < 0 or indices[-1] >= limit:
        return False
    if kind != "heads":
        return True
    return len({head // structure.heads_per_group for head in indices}) * structure.heads_per_group == len(indices)


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
        setattr(text, structure.names[name], size)
    if "num_attention_heads" in sizes and getattr(text, "num_key_value_heads", None) is not None:
        text.num_key_value_heads = sizes["num_attention_heads"] // structure.heads_per_group
    if getattr(text, "head_dim", None) is None and text.hidden_size // text.num_attention_heads != structure.head_dim:
        text.head_dim = structure.head_dim
    try:
        type(config).from_dict(config.to_dict())
    except Exception as error:
        requested = ", ".join(f"{name}={size}" for name, size in sizes.items())
        raise DistillError(
            f"{type(config).__name__} does not allow these sizes ({requested}), so that the student could not be "
            f"loaded: {str(error).splitlines()[-1].strip()}"
        ) from error
    return config


@torch.no_grad()
def _keep_embedding_scale(student: PreTrainedModel, structure: WidthStructure, factor: float) -> None:
    """Multiply the embeddings of a student by a factor, which its multiplication by sqrt(hidden_size) lacks.

    If the output head is tied to the embeddings, the last norm is divided by the factor, so that logits do not change.

    Raises:
        DistillError: the last norm of a tied head is not found.
    """
    embeddings: Tensor = cast(Any, student).get_input_embeddings().weight
    head = cast(Any, student).get_output_embeddings()
    embeddings.mul_(factor)
    if head is None or head.weight is not embeddings:
        return
    root = cast(nn.Module, student)
    blocks, _ = find_blocks(root)
    norms = [
        name.removesuffix(".weight")
        for name, axes in structure.axes.items()
        if len(axes) == 1 and axes[0] is not None and axes[0].kind == "channels" and not name.startswith(f"{blocks}.")
    ]
    if len(norms) != 1:
        raise DistillError(
            f"hidden_size of {type(student).__name__} cannot be pruned: its embeddings are multiplied by the square "
            f"root of the hidden size and tied to its output head, and its last norm is not found among {norms}."
        )
    norm: Any = root.get_submodule(norms[0])
    weight: Tensor = norm.weight
    signs = torch.ones_like(weight)
    signs[1::2] = -1  # mean 0, root mean square 1
    offset = ((norm(signs) * signs).float() - weight.float()).median().round()  # 1 if it multiplies by 1 + weight
    weight.copy_((weight.float() + offset) / factor - offset)
