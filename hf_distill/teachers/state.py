"""State of non-frozen teachers: the drift of their weights, and their files in a checkpoint."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import DistillError
from ..models.sharding import local_shard

_SAMPLED_ELEMENTS = 4096  # per tensor, approximately


class WeightDrift:
    """Distance of weights from their initial values, relative to the norm of these.

    It is estimated from a sample of the elements, because a second copy of the weights would need too much memory.

    start: name -> initial values of the sampled elements of each tensor, float32
    """

    def __init__(self) -> None:
        self.start: dict[str, Tensor] = {}

    def begin(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the present values as the initial ones."""
        self.start = {name: _sample(local_shard(tensor)).detach().float().clone() for name, tensor in tensors.items()}

    @torch.no_grad()
    def relative_to_start(self, tensors: Mapping[str, Tensor], is_sharded: bool) -> float:
        """Return ||now - start|| / ||start||.

        Args:
            tensors: name -> the present values.
            is_sharded: whether each rank holds a shard of them; sums are then taken over all ranks.
        """
        squares = torch.zeros(2, dtype=torch.float64, device=local_shard(next(iter(tensors.values()))).device)
        for name, start in self.start.items():
            now = local_shard(tensors[name])
            infinite = start.isinf()  # buffers that are attention masks
            start = start.masked_fill(infinite, 0)
            difference = _sample(now).float().masked_fill(infinite, 0) - start
            elements_per_sample = now.numel() / max(start.numel(), 1)
            squares += elements_per_sample * torch.stack([difference.square().sum(), start.square().sum()]).double()
        if is_sharded:
            torch.distributed.all_reduce(squares)
        return float((squares[0] / squares[1]).sqrt())


def _sample(values: Tensor) -> Tensor:
    flat = values.flatten()
    return flat[:: max(1, len(flat) // _SAMPLED_ELEMENTS)]


def state_file(folder: str, rank: int, is_sharded: bool) -> Path:
    """Return the path of a teacher's file in a checkpoint; each rank has one where the student is sharded."""
    return Path(folder) / (f"teacher-{rank}.safetensors" if is_sharded else "teacher.safetensors")


def save_state(file: Path, **groups: Mapping[str, Tensor]) -> None:
    """Write groups of named tensors into one file, and create its folder if the main process has not yet done so."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{group}.{name}": value for group, named in groups.items() for name, value in named.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, file)


def load_state(file: Path, device: torch.device, **names: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    """Read what `save_state` wrote.

    Args:
        file: see `state_file`.
        device: where the tensors are put.
        names: group -> names of the tensors that the group must hold, no more and no less.

    Raises:
        DistillError: there is no such file, or it holds the state of another teacher.
    """
    if not file.is_file():
        raise DistillError(
            f"{file.parent} has no {file.name}: it was written by a run with another kind of teacher. Resume with the "
            "teacher of the run that wrote it."
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value.to(device)
    for group, expected in names.items():
        differ = sorted(set(expected) ^ groups.get(group, {}).keys())
        if differ:
            raise DistillError(
                f"{file} holds the state of another teacher: {', '.join(differ[:3])} "
                f"{'is' if len(differ) == 1 else 'are'} either in the file or in this run's teacher, but not in both. "
                "Resume with the teacher and student of the run that wrote it."
            )
    return groups
