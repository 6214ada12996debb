"""Which layers and hidden channels of its teacher a pruned student consists of; losses on features read it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

from torch import nn

from .model_types import unwrap_model

_ATTRIBUTE = "hf_distill_origin"


@dataclass(frozen=True)
class PrunedOrigin:
    """The units of the teacher that a pruned student consists of. It is an attribute of the model in memory, and is
    not saved.

    depths:   stack -> number of the teacher's layers; the stack is "encoder" or "decoder" of a model that has both,
              else None
    layers:   stack -> indices of the teacher's layers that were kept, ascending
    width:    hidden size of the teacher
    channels: indices of its hidden channels that were kept, ascending; None: all
    """

    depths: Mapping[str | None, int]
    layers: Mapping[str | None, tuple[int, ...]]
    width: int
    channels: tuple[int, ...] | None = None

    def layers_of(self, stack: str | None, n_student: int, n_teacher: int) -> tuple[int, ...] | None:
        """Return the kept layers of a stack; None if these depths are not those of the student and its teacher."""
        layers = self.layers.get(stack)
        return layers if layers and len(layers) == n_student and self.depths[stack] == n_teacher else None

    def channels_of(self, from_width: int, to_width: int) -> tuple[int, ...] | None:
        """Return the kept channels; None if all were kept, or the widths are not those of student and teacher."""
        channels = self.channels
        return channels if channels and len(channels) == from_width and self.width == to_width else None


def record_origin(student: nn.Module, origin: PrunedOrigin) -> None:
    """Record what a student was pruned from."""
    setattr(unwrap_model(student), _ATTRIBUTE, origin)


def origin_of(model: nn.Module) -> PrunedOrigin | None:
    """Return what a model was pruned from; None if it was not pruned in this process."""
    return cast(PrunedOrigin | None, getattr(unwrap_model(model), _ATTRIBUTE, None))
