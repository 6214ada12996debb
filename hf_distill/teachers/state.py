"""What a teacher keeps in a checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DistillError


def state_file(folder: str, rank: int, shared: bool) -> Path:
    """A teacher's file in a checkpoint; `shared`: each rank has one of its own."""
    return Path(folder) / (f"teacher-{rank}.safetensors" if shared else "teacher.safetensors")


def save_state(file: Path, **groups: Mapping[str, Tensor]) -> None:
    """Write groups of named tensors into one file, whose folder the main process may not have made yet."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


def load_state(file: Path, device: torch.device, **names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Read what `save_state` wrote, on a device.

    Args:
        file: see `state_file`.
        device: of the tensors.
        names: group -> names that it has to hold, no more and no less.

    Raises:
        DistillError: there is no such file, or it holds the state of another teacher.
    """
    if not file.is_file():
        raise DistillError(f"{file.parent} has no {file.name}: it was written by a run with another kind of teacher.")
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value.to(device)
    for group, expected in names.items():
        differ = sorted(set(expected) ^ groups.get(group, {}).keys())
        if differ:
            raise DistillError(
                f"{file} holds the state of another teacher: {', '.join(differ[:3])} "
                f"{'is' if len(differ) == 1 else 'are'} in it or in this run's teacher alone. Resume with the teacher "
                "and student of the run that wrote it."
            )
    return groups
