"""The sidecar: every trained module that is not the student.

Projectors, a teacher that trains. It hangs on the student as a submodule, so optimizers, clipping, DDP, ZeRO and FSDP
find its parameters, and it runs inside the student's forward. It has no part in the student's state dict: whatever
saves the student saves it without. Checkpoints hold it in a file of its own.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import DistillError
from .blocks import SIDECAR
from .model_types import unwrap_parallel

FILE = "sidecar.safetensors"


class Sidecar(nn.Module):
    """Modules by kind and by the term that they serve: `sidecar.parts["projectors"]["hidden_cosine"]`."""

    def __init__(self, parts: dict[str, dict[str, nn.Module]]):
        super().__init__()
        self.parts = nn.ModuleDict({kind: nn.ModuleDict(of_kind) for kind, of_kind in parts.items()})
        self.register_state_dict_post_hook(_leave_out)
        self.register_load_state_dict_post_hook(_not_missing)

    def forward(self, call: Callable[["Sidecar"], Any]) -> Any:
        """`call(self)`, inside the forward of this module and so of the student."""
        return call(self)

    def get(self, kind: str, term: str) -> Any:
        """The module of a kind that serves a term; None if it needs none."""
        return self.parts[kind][term] if kind in self.parts and term in self.parts[kind] else None


def attach(model: nn.Module, sidecar: Sidecar | None) -> None:
    """Hang a sidecar on a student, in the place of an earlier one; None: just take that off."""
    student = unwrap_parallel(model)
    student._modules.pop(SIDECAR, None)
    if sidecar is not None:
        student.add_module(SIDECAR, sidecar)


def sidecar_of(model: nn.Module) -> Sidecar | None:
    """The sidecar of a student, in wrappers or not."""
    sidecar: Any = unwrap_parallel(model)._modules.get(SIDECAR)
    return sidecar


def strip_sidecar(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's state dict that was put together from parameters, without the sidecar's."""
    return {key: value for key, value in state_dict.items() if SIDECAR not in key.split(".")}


def save_sidecar(sidecar: Sidecar, folder: str, write: bool) -> None:
    """Write `sidecar.safetensors`. Called on every rank, since sharded parameters have to be gathered.

    Args:
        sidecar: whole or sharded (ZeRO-3, FSDP2).
        folder: of a checkpoint.
        write: whether this rank writes.
    """
    state = gathered_state_dict(sidecar)
    if write:
        save_file(state, Path(folder) / FILE)


def gathered_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """A trained module's parameters, tied ones once, and the buffers that it saves; called on every rank.

    Args:
        module: of a sidecar, whole or sharded.
    """
    with _gathered(module):
        return {name: _full_tensor(t.detach()).cpu().contiguous().clone() for name, t in _saved_tensors(module).items()}


@torch.no_grad()
def load_sidecar(sidecar: Sidecar, folder: str) -> None:
    """Read what `save_sidecar` wrote.

    Raises:
        DistillError: the checkpoint has no sidecar, or that of other losses.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise DistillError(
            f"{folder} has no {FILE}: it was written by a run without projectors or a teacher that trains. Resume with "
            "the `losses`, `projectors` and teacher of that run, or start afresh."
        )
    state = load_file(file)
    with _gathered(sidecar, modify=True):
        own = _saved_tensors(sidecar)
        shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (own, state)]
        if shapes[0] != shapes[1]:
            raise DistillError(
                f"{file} holds {_summarize(shapes[1], shapes[0])} and this run has {_summarize(shapes[0], shapes[1])}: "
                "resume with the `losses`, `projectors` and teacher of the run that wrote it, or start afresh."
            )
        for name, parameter in own.items():
            parameter.data.copy_(_distribute_like(state[name], parameter))


def move_to_param_groups(
    optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], options: dict[str, float]
) -> None:
    """Move parameters into groups of their own, one beside each group that they are in.

    Args:
        optimizer: any; parameters that it lacks join those of its first group, which is the one with decay.
        parameters: of a sidecar.
        options: "lr" of the new groups, "weight_decay" of the first of them; else as the group beside.
    """
    mine, given = {id(p): p for p in parameters}, dict(options)
    lacking = mine.keys() - {id(p) for group in optimizer.param_groups for p in group["params"]}
    for group in list(optimizer.param_groups):
        moved = [p for p in group["params"] if id(p) in mine]
        group["params"] = [p for p in group["params"] if id(p) not in mine]
        if group is optimizer.param_groups[0]:
            moved += [mine[key] for key in mine if key in lacking]
        else:
            given.pop("weight_decay", None)
        if moved:
            beside = {k: v for k, v in group.items() if k not in ("params", "param_names")}
            optimizer.add_param_group({**beside, **given, "params": moved})


def _leave_out(module: nn.Module, state_dict: dict, prefix: str, _metadata: Any) -> None:
    for key in [key for key in state_dict if prefix and key.startswith(prefix)]:
        del state_dict[key]


def _not_missing(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if SIDECAR not in key.split(".")]


def _saved_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, tied ones once, and buffers that are saved."""
    named = dict(module.named_parameters())
    for prefix, part in module.named_modules():
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                named[f"{prefix}.{name}" if prefix else name] = buffer
    return named


def _gathered(module: nn.Module, modify: bool = False) -> Any:
    """A context in which parameters that ZeRO-3 has partitioned are whole."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=0 if modify else None)


def _summarize(shapes: dict[str, tuple], others: dict[str, tuple]) -> str:
    """The first few of the shapes that the others lack or have otherwise."""
    differ = {name: shape for name, shape in shapes.items() if others.get(name) != shape}
    return f"{dict(list(differ.items())[:3])}{' and more' if len(differ) > 3 else ''}"


def _full_tensor(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _distribute_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value laid out as a parameter, which FSDP2 may have sharded."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
