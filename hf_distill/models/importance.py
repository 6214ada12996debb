"""Importance of hidden channels, neurons, attention heads and experts, which decides what a pruned student keeps."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import DistillError
from .pruning import InfluenceRecorder, run_with_hooks
from .width_structure import Axis, WidthStructure, check_prunable, find_width_structure

ImportanceMeasure = Literal["activation", "weight"]


@dataclass(frozen=True)
class Importance:
    """Importance of the units of a model; the least important are removed first.

    by:              how it was measured
    structure:       the units
    channels:        [H]; None if the hidden channels were not found
    neurons:         module -> [I], or [E, I] for the experts of a module
    heads:           module -> importance of its query heads [A]
    experts:         module -> [E]
    block_influence: see `block_influence`; None if it was not measured
    """

    by: ImportanceMeasure
    structure: WidthStructure
    channels: Tensor | None
    neurons: dict[str, Tensor]
    heads: dict[str, Tensor]
    experts: dict[str, Tensor]
    block_influence: list[float] | None = None


def measure_importance(
    model: nn.Module,
    batches: Iterable[dict],
    *,
    by: ImportanceMeasure = "activation",
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

    Raises:
        DistillError: the model is quantized, has adapters or is no causal language model; `by` is another word; or
            there is no batch with a token.

    Source: Minitron, arXiv 2407.14679 (mean over tokens and L2 norm over rows are the aggregation that it found best).
    """
    if by not in ("activation", "weight"):
        raise DistillError(f"by is {by!r}: choose activation or weight.")
    inner = check_prunable(model)
    structure = find_width_structure(inner)
    influence = InfluenceRecorder(inner) if with_block_influence else None
    recorder = _Recorder(inner, structure) if by == "activation" else None
    if influence is not None or recorder is not None:
        parts = [part for part in (influence, recorder) if part is not None]

        def start_batch(mask: Tensor) -> None:
            for part in parts:
                part.start_batch(mask)

        run_with_hooks(inner, batches, start_batch, [handle for part in parts for handle in part.handles])
    blocks = influence.influence() if influence is not None else None
    channels, neurons, heads, experts = _by_weight(inner, structure) if recorder is None else recorder.scores()
    return Importance(by, structure, channels, neurons, heads, experts, blocks)


_Scores = tuple[Tensor | None, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]


class _Recorder:
    """Sums of activations over rows, from hooks."""

    def __init__(self, model: PreTrainedModel, structure: WidthStructure):
        self.structure = structure
        self.handles: list[Any] = []
        self.count = 0
        self._row_weights: Tensor | None = None  # [B, S]: 1 / tokens of the row, and 0 for masked tokens
        self._sums: dict[tuple[str, str], Tensor] = {}
        modules = dict(cast(nn.Module, model).named_modules())
        for name, axes in structure.axes.items():
            owner = name.rpartition(".")[0]
            module, last = modules[owner], axes[-1]
            if last is None or not name.endswith(".weight"):
                continue
            if isinstance(module, nn.Linear) and last.kind in ("neurons", "heads"):
                self.handles.append(module.register_forward_pre_hook(self._input_hook(last)))
            elif last.kind == "channels" and len(axes) == 1 and not isinstance(module, nn.Linear | nn.Embedding):
                self.handles.append(module.register_forward_hook(self._output_hook(owner)))

    def start_batch(self, mask: Tensor) -> None:
        """Set the tokens of the next batch that are counted, a boolean [B, S]."""
        self.count += int(mask.sum())
        self._row_weights = mask.float() / mask.sum(-1, keepdim=True).clamp_min(1)

    def scores(self) -> _Scores:
        """Return the importance of all units.

        Raises:
            DistillError: there was no token.
        """
        if self.count == 0:
            raise DistillError("measure_importance needs at least one batch with a token in it.")
        roots = {key: total.sqrt() for key, total in self._sums.items()}
        channels = [value for (kind, _), value in roots.items() if kind == "channels"]
        parts = [
            {group: value for (of, group), value in roots.items() if of == kind}
            for kind in ("neurons", "heads", "experts")
        ]
        return (torch.stack(channels).sum(0) if channels else None, *parts)  # type: ignore[return-value]

    def _add(self, kind: str, group: str, magnitudes: Tensor) -> None:
        """Add a batch: magnitudes [B, S, N]."""
        weights = cast(Tensor, self._row_weights).to(magnitudes.device)
        means = torch.bmm(weights.unsqueeze(1), magnitudes.float()).squeeze(1)
        total = means.double().square().sum(0)
        key = (kind, group)
        self._sums[key] = self._sums[key] + total if key in self._sums else total

    def _input_hook(self, axis: Axis) -> Callable[..., None]:
        size = axis.runs[0].size

        def record(_module: nn.Module, args: tuple) -> None:
            value = args[0]
            if axis.kind == "heads":
                value = torch.linalg.vector_norm(value.unflatten(-1, (-1, size)), dim=-1, dtype=torch.float32)
            self._add(axis.kind, axis.group, value.abs())

        return record

    def _output_hook(self, name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            self._add("channels", name, output.abs())

        return record


@torch.no_grad()
def _by_weight(model: PreTrainedModel, structure: WidthStructure) -> _Scores:
    """Return the L2 norms of the weights of each unit; a weight that modules share is counted once."""
    sums: dict[tuple[str, str], Tensor] = {}
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
    roots = {key: total.double().sqrt() for key, total in sums.items()}
    parts = [
        {group: value for (of, group), value in roots.items() if of == kind} for kind in ("neurons", "heads", "experts")
    ]
    return (roots.get(("channels", "")), *parts)  # type: ignore[return-value]


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
