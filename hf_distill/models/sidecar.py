"""The sidecar: all trained modules outside the student, such as projectors and a jointly trained teacher.

It is a submodule of the student, so that optimizers, gradient clipping, DDP, ZeRO and FSDP2 find its parameters, and it
runs inside the student's forward. It is no part of the student's state dict, so the student is saved without it.
Checkpoints have it in a separate file, `sidecar.safetensors`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from ..errors import DistillError
from .blocks import SIDECAR
from .model_types import unwrap_parallel
from .sharding import distribute_like, full_tensor, gathered

FILE = "sidecar.safetensors"
_T = TypeVar("_T")


class Sidecar(nn.Module):
    """Trained modules, by kind and by the name of their term: `sidecar.parts["projectors"]["hidden_cosine"]`.

    Args:
        parts: kind -> name of the term -> module.
    """

    def __init__(self, parts: dict[str, dict[str, nn.Module]]):
        super().__init__()
        self.parts = nn.ModuleDict({kind: nn.ModuleDict(modules) for kind, modules in parts.items()})
        self.register_state_dict_post_hook(_remove_from_state_dict)
        self.register_load_state_dict_post_hook(_remove_from_missing_keys)

    def forward(self, call: Callable[["Sidecar"], _T]) -> _T:
        """Return `call(self)`, run inside the forward of this module, where wrappers gather its parameters."""
        return call(self)

    def get(self, kind: str, term: str) -> nn.Module | None:
        """Return the module of a kind for a term; None if the term has none."""
        if kind not in self.parts:
            return None
        modules = self.parts[kind]
        return modules[term] if isinstance(modules, nn.ModuleDict) and term in modules else None


def attach(model: nn.Module, sidecar: Sidecar | None) -> None:
    """Attach a sidecar to a student, replacing an earlier one; None removes it."""
    student = unwrap_parallel(model)
    student._modules.pop(SIDECAR, None)
    if sidecar is not None:
        student.add_module(SIDECAR, sidecar)


def sidecar_of(model: nn.Module) -> Sidecar | None:
    """Return the sidecar of a student, with or without wrappers; None if it has none."""
    return cast(Sidecar | None, unwrap_parallel(model)._modules.get(SIDECAR))


def strip_sidecar(state_dict: Mapping[str, _T]) -> dict[str, _T]:
    """Return parameters or modules by name, such as a state dict, without those of the sidecar."""
    return {key: value for key, value in state_dict.items() if SIDECAR not in key.split(".")}


def save_sidecar(sidecar: Sidecar, folder: str, write: bool) -> None:
    """Write `sidecar.safetensors`. Every rank has to call it, because sharded parameters are gathered.

    Args:
        sidecar: the sidecar, sharded (ZeRO-3, FSDP2) or not.
        folder: folder of a checkpoint.
        write: whether this rank writes the file.
    """
    state = gathered_state_dict(sidecar)
    if write:
        save_file(state, Path(folder) / FILE)


def gathered_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded parameters (tied ones once) and persistent buffers of a module, on the CPU.

    Every rank has to call it.

    Args:
        module: a module of a sidecar, sharded (ZeRO-3, FSDP2) or not.
    """
    with gathered(module.parameters()):
        return {name: full_tensor(t.detach()).cpu().contiguous().clone() for name, t in _saved_tensors(module).items()}


@torch.no_grad()
def load_sidecar(sidecar: Sidecar, folder: str) -> None:
    """Load the file that `save_sidecar` wrote. Every rank has to call it.

    Args:
        sidecar: the sidecar, sharded (ZeRO-3, FSDP2) or not.
        folder: folder of a checkpoint.

    Raises:
        DistillError: the checkpoint has no sidecar, or one with other parameters.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise DistillError(
            f"{folder} has no {FILE}: it was written by a run without projectors and without a jointly trained "
            "teacher. Resume with the `losses`, `projectors` and teacher of that run, or start a new run."
        )
    state = load_file(file)
    with gathered(sidecar.parameters(), modify=True):
        tensors = _saved_tensors(sidecar)
        run_shapes, file_shapes = ({name: tuple(t.shape) for name, t in part.items()} for part in (tensors, state))
        if run_shapes != file_shapes:
            raise DistillError(
                f"{file} holds {_summarize(file_shapes, run_shapes)} and this run has "
                f"{_summarize(run_shapes, file_shapes)}: resume with the `losses`, `projectors` and teacher of the run "
                "that wrote it, or start a new run."
            )
        for name, parameter in tensors.items():
            parameter.data.copy_(distribute_like(state[name], parameter))


def move_to_param_groups(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], options: dict[str, float]
) -> None:
    """Move parameters of a sidecar from the optimizer's parameter groups to new ones.

    For each group with such parameters a new group is added, with its options unless `options` sets others.

    Args:
        optimizer: any optimizer. Parameters that it does not have are added with those of its first group, which has
            weight decay.
        parameters: parameters of a sidecar.
        options: "lr" of the new groups, and "weight_decay" of the first of them.
    """
    to_move, new_options = {id(p): p for p in parameters}, dict(options)
    missing = to_move.keys() - {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in to_move]
        group["params"] = [p for p in group["params"] if id(p) not in to_move]
        if group is optimizer.param_groups[0]:
            moved += [to_move[key] for key in to_move if key in missing]
        else:
            new_options.pop("weight_decay", None)
        if moved:
            group_options = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            optimizer.add_param_group({**group_options, **new_options, "params": moved})


def _remove_from_state_dict(module: nn.Module, state_dict: dict, prefix: str, _metadata: object) -> None:
    for key in [key for key in state_dict if prefix and key.startswith(prefix)]:
        del state_dict[key]


def _remove_from_missing_keys(_module: nn.Module, keys: _IncompatibleKeys) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if SIDECAR not in key.split(".")]


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters (tied ones once) and persistent buffers of a module by name."""
    named: dict[str, Tensor] = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = buffer
    return named


def _summarize(shapes: dict[str, tuple], others: dict[str, tuple]) -> str:
    """Return the first three shapes that differ from the others, for an error message."""
    different = {name: shape for name, shape in shapes.items() if others.get(name) != shape}
    return f"{dict(list(different.items())[:3])}{' and more' if len(different) > 3 else ''}"
