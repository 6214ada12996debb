"""Importance of hidden channels, neurons, attention heads and experts, which decides what a pruned student keeps."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..core.defaults import IMPORTANCE_MEASURE
from ..errors import DistillError
from .pruning import InfluenceRecorder, run_on_batches
from .unit_activations import ActivationRecorder
from .width_axes import Axis, Kind, WidthStructure
from .width_structure import check_prunable, find_width_structure

ImportanceMeasure = Literal["activation", "weight"]


@dataclass(frozen=True)
class Importance:
    """Importance of the units of a model; the least important are removed first.

    by:              how it was measured
    structure:       the units
    values:          (kind, module) -> importance of its units [N], or [E, N] of the neurons of experts; the module of
                     hidden channels is ""
    block_influence: see `block_influence`; None if it was not measured
    """

    by: ImportanceMeasure
    structure: WidthStructure
    values: dict[tuple[Kind, str], Tensor]
    block_influence: list[float] | None = None

    def scores(self, kind: Kind, group: str) -> Tensor:
        """Return the importance of the units of a module, [N] or [E, N].

        Raises:
            DistillError: it was not measured.
        """
        if (kind, group) not in self.values:
            raise DistillError(
                f"The importance of the {kind} of {group or 'the model'} is not known by {self.by}: no module was "
                "found whose input or output it can be read from. Use by='weight'."
            )
        return self.values[kind, group]


def measure_importance(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    by: ImportanceMeasure = IMPORTANCE_MEASURE,
    with_block_influence: bool = False,
) -> Importance:
    """Measure how important the units of a causal language model are, in one pass over calibration batches.

    By activation, the importance of a unit is sqrt(sum over rows of (mean over the row's tokens of |a|)^2), where a is:

        hidden channel: the outputs of all norms over the hidden channels, summed over the norms
        neuron:         its activation, which the last weight of its feed-forward network reads
        head:           the L2 norm of its output, which the output projection of its attention reads
        expert:         the probability that the router gives it, before the choice of the best

    By weight, it is the L2 norm of all weights of the unit, and nothing runs unless block influence is measured.

    Args:
        model: a causal language model of transformers.
        batches: inputs, `input_ids` [B, S] and optionally `attention_mask` [B, S]; masked tokens are not counted.
        by: "activation" or "weight".
        with_block_influence: whether block influence is measured in the same pass.

    Returns:
        the importance of the units, and block influence if it was measured.

    Raises:
        DistillError: the model is quantized, has adapters or is no causal language model; `by` is another word; or
            there is no batch with a token.

    Source: Minitron, arXiv 2407.14679 (mean over tokens and L2 norm over rows are the aggregation that it found best).
    """
    if by not in ("activation", "weight"):
        raise DistillError(f"by is {by!r}: choose activation or weight.")
    inner = check_prunable(model)
    structure = find_width_structure(inner)
    with ExitStack() as hooks:
        influence = InfluenceRecorder(inner, hooks) if with_block_influence else None
        recorder = ActivationRecorder(inner, structure, hooks) if by == "activation" else None
        recorders = [one for one in (influence, recorder) if one is not None]

        def start_batch(mask: Tensor) -> None:
            for one in recorders:
                one.start_batch(mask)

        if recorders:
            run_on_batches(inner, batches, start_batch)
    blocks = influence.influence() if influence is not None else None
    scores = _by_weight(inner, structure) if recorder is None else recorder.scores()
    return Importance(by, structure, scores, blocks)


@torch.no_grad()
def _by_weight(model: PreTrainedModel, structure: WidthStructure) -> dict[tuple[Kind, str], Tensor]:
    """Return the L2 norms of the weights of each unit; a weight that modules share is counted once."""
    sums: dict[tuple[Kind, str], Tensor] = {}
    for name, parameter in cast(nn.Module, model).named_parameters():
        for dim, axis in enumerate(structure.axes[name]):
            if axis is None:
                continue
            squares = parameter.float().square()
            axes = structure.axes[name]
            keep = [i for i, other in enumerate(axes) if other is not None and other.kind == "experts" and i != dim]
            keep = keep if axis.kind == "neurons" else []
            rest = [i for i in range(squares.dim()) if i != dim and i not in keep]
            units = _sum_units(squares.sum(rest) if rest else squares, axis, structure)
            key = (axis.kind, axis.group)
            sums[key] = sums[key] + units if key in sums else units
    return {key: total.double().sqrt() for key, total in sums.items()}


def _sum_units(values: Tensor, axis: Axis, structure: WidthStructure) -> Tensor:
    """Sum a dimension [..., D] to its units [..., N]; the entries of a key-value group count for all of its heads."""
    count = structure.sizes[axis.size]
    total: Tensor | None = None
    for run in axis.runs:
        number = structure.sizes["num_key_value_heads"] if run.by_group else count
        part = values[..., run.start : run.start + number * run.size].unflatten(-1, (number, run.size)).sum(-1)
        part = part.repeat_interleave(count // number, dim=-1) / (count // number)
        total = part if total is None else total + part
    return cast(Tensor, total)
