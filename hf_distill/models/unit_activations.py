"""Sums the activations of channels, neurons, heads and experts while a model runs."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..errors import DistillError
from .width_axes import Axis, Kind, WidthStructure
from .width_probe import reads_units


class ActivationRecorder:
    """Sums, over rows, the squares of means over the row's tokens of what `measure_importance` reads.

    Args:
        model: a causal language model.
        structure: its units.
        hooks: stack that removes the hooks when it is closed.
    """

    def __init__(self, model: PreTrainedModel, structure: WidthStructure, hooks: ExitStack):
        self.structure, self._hooks = structure, hooks
        self._count = 0
        self._row_weights = torch.empty(0)  # [B, S]: 1 / tokens of the row, and 0 for masked tokens
        self._sums: dict[tuple[Kind, str], Tensor] = {}
        self._norm_sums: dict[str, Tensor] = {}
        self._has_expert_tensors = False
        root = cast(nn.Module, model)
        for name, axes in structure.axes.items():
            owner = name.rpartition(".")[0]
            module, read = root.get_submodule(owner), None
            if isinstance(module, nn.Embedding):
                continue
            for dim, axis in enumerate(axes):
                if axis is not None and axis.kind in ("neurons", "heads") and reads_units(root, name, dim):
                    read = axis
            if isinstance(module, nn.Linear) and read is not None:
                hooks.callback(module.register_forward_pre_hook(self._input_hook(read)).remove)
            elif read is not None and axes[0] is not None and axes[0].kind == "experts":
                self._record_experts(module, getattr(module, name.rpartition(".")[2]), read)
            elif axes[-1] is not None and axes[-1].kind == "channels":
                if len(axes) == 1 and name.endswith(".weight"):
                    hooks.callback(module.register_forward_hook(self._norm_hook(owner)).remove)
                elif len(axes) == 2 and axes[0] is not None and axes[0].kind == "experts":
                    hooks.callback(module.register_forward_hook(self._router_hook(axes[0])).remove)
        if self._has_expert_tensors:  # other implementations multiply the tensors of all experts in one call
            hooks.callback(model.set_experts_implementation, model.get_experts_implementation())
            model.set_experts_implementation("eager")

    def start_batch(self, mask: Tensor) -> None:
        """Set the tokens of the next batch that are counted, a boolean [B, S]."""
        self._count += int(mask.sum())
        self._row_weights = mask.float() / mask.sum(-1, keepdim=True).clamp_min(1)

    def scores(self) -> dict[tuple[Kind, str], Tensor]:
        """Return (kind, module) -> importance of the units, [N] or [E, N]; the module of hidden channels is "".

        Raises:
            DistillError: there was no token.
        """
        if self._count == 0:
            raise DistillError("measure_importance needs at least one batch with a token in it.")
        scores = {key: total.sqrt() for key, total in self._sums.items()}
        if self._norm_sums:
            scores["channels", ""] = torch.stack([total.sqrt().cpu() for total in self._norm_sums.values()]).sum(0)
        return scores

    def _add(self, kind: Kind, group: str, row_means: Tensor) -> None:
        """Add the rows of a batch, [B, N] or [B, E, N]."""
        self._sums[kind, group] = self._sums.get((kind, group), 0) + row_means.double().square().sum(0)

    def _row_means(self, magnitudes: Tensor) -> Tensor:
        """Return the mean over each row's tokens, [B, N], of magnitudes [B, S, N]."""
        weights = self._row_weights.to(magnitudes.device, magnitudes.dtype)
        return torch.bmm(weights.unsqueeze(1), magnitudes).squeeze(1)

    def _input_hook(self, axis: Axis) -> Callable[..., None]:
        size = axis.runs[0].size

        def record(_module: nn.Module, args: tuple) -> None:
            value = args[0].float().reshape(*self._row_weights.shape, -1)
            if axis.kind == "heads":
                value = torch.linalg.vector_norm(value.unflatten(-1, (-1, size)), dim=-1)
            self._add(axis.kind, axis.group, self._row_means(value.abs()))

        return record

    def _norm_hook(self, name: str) -> Callable[..., None]:
        def record(_module: nn.Module, _args: tuple, output: Tensor) -> None:
            magnitudes = output.float().abs().reshape(*self._row_weights.shape, -1)
            squares = self._row_means(magnitudes).double().square()
            self._norm_sums[name] = self._norm_sums.get(name, 0) + squares.sum(0)

        return record

    def _router_hook(self, axis: Axis) -> Callable[..., None]:
        count = self.structure.sizes[axis.size]

        def record(_module: nn.Module, _args: tuple, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            logits = next((value for value in outputs if value.shape[-1] == count), None)
            if logits is not None:
                masses = logits.float().softmax(-1).view(*self._row_weights.shape, count)
                self._add("experts", axis.group, self._row_means(masses))

        return record

    def _record_experts(self, module: nn.Module, weight: Tensor, axis: Axis) -> None:
        """Record the neurons of experts whose weights are in one tensor [E, ...]."""
        self._has_expert_tensors = True
        modes: list[_ExpertInputs] = []
        size = self.structure.sizes[axis.size]

        def start(_module: nn.Module, args: tuple) -> None:
            index = next((arg for arg in args if isinstance(arg, Tensor) and not arg.is_floating_point()), None)
            if index is None:
                return
            mode = _ExpertInputs(weight, index, self._row_weights, size)
            mode.__enter__()
            modes.append(mode)

        def end(_module: nn.Module, _args: tuple, _output: Any) -> None:
            if modes:
                mode = modes.pop()
                mode.__exit__(None, None, None)
                if mode.is_read:
                    self._add(axis.kind, axis.group, mode.row_means)

        self._hooks.callback(module.register_forward_pre_hook(start).remove)
        self._hooks.callback(module.register_forward_hook(end, always_call=True).remove)


class _ExpertInputs(TorchFunctionMode):
    """Reads what is multiplied with the last weight of each expert.

    Args:
        weight: weights of all experts, [E, ...].
        index: experts of each token, [T, K] with T = B * S.
        row_weights: weight of each token in the mean of its row, [B, S].
        size: I, number of neurons.

    Attributes:
        is_read:   whether an expert has read something.
        row_means: mean magnitude of each neuron over the tokens of each row, [B, E, I]; 0 for tokens of other experts.
    """

    def __init__(self, weight: Tensor, index: Tensor, row_weights: Tensor, size: int):
        super().__init__()
        self.weight, self.index, self.size = weight, index.view(row_weights.numel(), -1), size
        self.row_weights = row_weights.to(weight.device)
        self.is_read = False
        self.row_means = torch.zeros(len(row_weights), len(weight), size, device=weight.device)

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function of torch; read its inputs if one of them is a view of the weights."""
        tensors = [arg for arg in args[:2] if isinstance(arg, Tensor)]
        if len(tensors) == 2 and all(tensor.dim() == 2 and tensor.is_floating_point() for tensor in tensors):
            with torch._C.DisableTorchFunction():
                self._read(*tensors)
        return func(*args, **(kwargs or {}))

    def _read(self, inputs: Tensor, weight: Tensor) -> None:
        start = self.weight.data_ptr()
        offset = (weight.data_ptr() - start) // self.weight.element_size()
        if not 0 <= offset < self.weight.numel() or inputs.shape[-1] != self.size:
            return
        self.is_read = True
        expert = offset // self.weight.stride(0)
        # by choice, then by token, as the experts read them
        _, tokens = torch.where(self.index.T.eq(expert))
        if len(tokens) != len(inputs):
            raise DistillError(
                f"An expert reads {len(inputs)} tokens, and {len(tokens)} were given to it, so the importance of its "
                "neurons cannot be measured by activation: use by='weight'."
            )
        rows = tokens // self.row_weights.shape[1]
        magnitudes = inputs.float().abs() * self.row_weights.flatten()[tokens].unsqueeze(1)
        self.row_means[:, expert].index_add_(0, rows, magnitudes)
