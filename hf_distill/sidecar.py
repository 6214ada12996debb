"""The sidecar: every trained module that is not the student.

It hangs on the student as a submodule, so optimizers, clipping, DDP, ZeRO and FSDP find its parameters, and it runs
inside the student's forward. It has no part in the student's state dict: whatever saves the student saves it without.
Checkpoints hold it in a file of its own.
"""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .blocks import SIDECAR
from .errors import DistillError
from .tasks import unwrapped

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

    def part(self, kind: str, term: str) -> Any:
        """The module of a kind that serves a term; None if it needs none."""
        return self.parts[kind][term] if kind in self.parts and term in self.parts[kind] else None


def attach(model: nn.Module, sidecar: Sidecar | None) -> None:
    """Hang a sidecar on a student, in the place of an earlier one; None: just take that off."""
    student = unwrapped(model)
    student._modules.pop(SIDECAR, None)
    if sidecar is not None:
        student.add_module(SIDECAR, sidecar)


def sidecar_of(model: nn.Module) -> Sidecar | None:
    """The sidecar of a student, in wrappers or not."""
    sidecar: Any = unwrapped(model)._modules.get(SIDECAR)
    return sidecar


def split(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """A student's state dict that was put together from parameters, without the sidecar's."""
    return {key: value for key, value in state_dict.items() if SIDECAR not in key.split(".")}


def save_sidecar(sidecar: Sidecar, folder: str, write: bool) -> None:
    """Write `sidecar.safetensors`. Called on every rank, since sharded parameters have to be gathered.

    Args:
        sidecar: whole or sharded (ZeRO-3, FSDP2).
        folder: of a checkpoint.
        write: whether this rank writes.
    """
    with _whole(sidecar):
        state = {name: _full(p.detach()).cpu().contiguous() for name, p in sidecar.named_parameters()}
    if write:
        save_file(state, Path(folder) / FILE)


@torch.no_grad()
def load_sidecar(sidecar: Sidecar, folder: str) -> None:
    """Read what `save_sidecar` wrote.

    Raises:
        DistillError: the checkpoint has no sidecar, or that of other losses.
    """
    file = Path(folder) / FILE
    if not file.is_file():
        raise DistillError(
            f"{folder} has no {FILE}: it was written by a run without projectors. Resume with the `losses` and "
            "`projectors` of that run, or start afresh."
        )
    state = load_file(file)
    with _whole(sidecar, modify=True):
        own = dict(sidecar.named_parameters())
        shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (own, state)]
        if shapes[0] != shapes[1]:
            raise DistillError(
                f"{file} holds {shapes[1]} and this run has {shapes[0]}: resume with the `losses` and `projectors` of "
                "the run that wrote it, or start afresh."
            )
        for name, parameter in own.items():
            parameter.data.copy_(_like(state[name], parameter))


def own_group(optimizer: torch.optim.Optimizer, sidecar: Sidecar, **options: float | None) -> None:
    """Move the sidecar's parameters into a group of their own.

    Args:
        optimizer: any; parameters that it lacks are added.
        sidecar: whose parameters.
        options: of the group (lr, weight_decay); None: as the optimizer's first group.
    """
    mine = list(sidecar.parameters())
    ids = {id(p) for p in mine}
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in ids]
    given = {key: value for key, value in options.items() if value is not None}
    first = {k: v for k, v in optimizer.param_groups[0].items() if k not in ("params", "param_names")}
    optimizer.add_param_group({**first, **given, "params": mine})


def _leave_out(module: nn.Module, state_dict: dict, prefix: str, _metadata: Any) -> None:
    for key in [key for key in state_dict if prefix and key.startswith(prefix)]:
        del state_dict[key]


def _not_missing(_module: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [key for key in keys.missing_keys if SIDECAR not in key.split(".")]


def _whole(sidecar: Sidecar, modify: bool = False) -> Any:
    """A context in which parameters that ZeRO-3 has partitioned are whole."""
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(sidecar.parameters()), modifier_rank=0 if modify else None)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    """A whole value laid out as a parameter, which FSDP2 may have sharded."""
    if not hasattr(parameter, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
