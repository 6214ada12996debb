"""Projectors: from the student's width to the teacher's, for losses on hidden states. Trained, and never exported."""

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DistillError, did_you_mean

KINDS = ("auto", "linear", "mlp", "none")
INITS = ("orthogonal", "identity")


@dataclass(frozen=True)
class ProjectorConfig:
    """What stands between a student's hidden states and its teacher's.

    kind:          "auto": linear where widths differ, nothing where they agree; "linear", "mlp" or "none": always
    init:          "orthogonal", or "identity" (padded with zeros, or cut)
    learning_rate: their own; None: the run's
    weight_decay:  their own; None: the run's

    Raises:
        DistillError: an unknown value.
    """

    kind: str = "auto"
    init: str = "orthogonal"
    learning_rate: float | None = None
    weight_decay: float | None = None

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("init", INITS)):
            if getattr(self, name) not in known:
                raise DistillError(
                    f"projectors has {name} {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise DistillError(f"projectors has {name} {value!r}; it must be a number, 0 or more")

    @classmethod
    def of(cls, value: Any) -> "ProjectorConfig":
        """Read a config's value: a dict of fields, a kind, or None for the defaults."""
        if isinstance(value, str):
            return cls(kind=value)
        if value is not None and not isinstance(value, dict):
            raise DistillError(f"projectors is {value!r}; it must be a mapping or one of {', '.join(KINDS)}")
        known = [f.name for f in fields(cls)]
        for name in value or ():
            if name not in known:
                raise DistillError(f"projectors has no field {name!r}{did_you_mean(name, known)}")
        return cls(**(value or {}))

    @property
    def options(self) -> dict[str, float | None]:
        """Of their own in the optimizer; None: as the student's."""
        return {"lr": self.learning_rate, "weight_decay": self.weight_decay}

    def needs_projector(self, from_width: int, to_width: int) -> bool:
        """Whether a projector stands between these widths.

        Raises:
            DistillError: none is wanted and the widths differ.
        """
        if self.kind == "none" and from_width != to_width:
            raise DistillError(
                f"projectors is none, but the student's hidden states are {from_width} wide and the teacher's "
                f"{to_width}: leave projectors out, or use a loss that needs none (hidden_relation)."
            )
        return self.kind in ("linear", "mlp") or (self.kind == "auto" and from_width != to_width)

    def build(self, from_width: int, to_width: int, generator: torch.Generator) -> nn.Module:
        """A projector [N, from_width] -> [N, to_width]."""
        layers = [self._linear(from_width, to_width, generator)]
        if self.kind == "mlp":
            layers += [nn.GELU(), self._linear(to_width, to_width, generator)]
        return Projector(*layers)

    def _linear(self, from_width: int, to_width: int, generator: torch.Generator) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, from_width, to_width, bias=False)  # leaves the global random state alone
        with torch.no_grad():
            if self.init == "identity":
                nn.init.eye_(layer.weight)
            else:
                nn.init.orthogonal_(layer.weight, generator=generator)
        return layer


class Projector(nn.Sequential):
    """Layers that take hidden states of any dtype in their own."""

    def forward(self, hidden: Tensor) -> Tensor:
        """[N, from_width] -> [N, to_width]."""
        return super().forward(hidden.to(next(self.parameters()).dtype))


class LayerMixture(nn.Module):
    """Which teacher layers each student layer learns from: softmax of trained weights, [L_s, L_t].

    It starts with 0.9 on the layer that `stretch` gives, and the rest spread evenly.

    Source: ALP-KD, arXiv 2012.14022.
    """

    def __init__(self, pairs: list[tuple[int, int]], n_teacher: int):
        super().__init__()
        weight = torch.zeros(len(pairs), n_teacher)
        for row, (_, layer) in enumerate(pairs):
            weight[row, layer] = math.log(9 * max(n_teacher - 1, 1))
        self.weight = nn.Parameter(weight)
        self.shares = weight.softmax(-1)  # no buffer: nothing to save

    def forward(self) -> Tensor:
        """[L_s, L_t], rows that sum to 1; kept in `shares` without graph."""
        shares = self.weight.softmax(-1)
        self.shares = shares.detach()
        return shares
