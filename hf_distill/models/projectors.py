"""Projectors from the student's hidden size to the teacher's, for losses on hidden states. They are not exported."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..core.component_options import ProjectorOptions, option_errors
from ..errors import DistillError


class ProjectorConfig(ProjectorOptions):
    """Options of the projectors, and the projectors that they describe.

    kind:          "auto" (linear if the widths differ, else none), "linear", "mlp" or "none"
    init:          "orthogonal", "identity" (padded with zeros, or truncated), "selection" (the teacher's channels that
                   a pruned student kept), or "auto" (selection for such a student, else orthogonal)
    trainable:     whether they are trained
    learning_rate: of the projectors; None for that of the run
    weight_decay:  of the projectors; None for that of the run
    """

    @classmethod
    def of(cls, value: object) -> "ProjectorConfig":
        """Read the value of a config: a dict of options, a kind, or None for the defaults.

        Raises:
            DistillError: it is none of these, an option is unknown, or its value is out of range.
        """
        values = {} if value is None else {"kind": value} if isinstance(value, str) else value
        if not isinstance(values, dict):
            raise DistillError(f"projectors is {value!r}; it must be a mapping or the kind of the projectors")
        with option_errors("projectors", list(cls.model_fields)):
            return cls(**values)

    @property
    def options(self) -> dict[str, float | None]:
        """Options of the projectors' parameter groups; None for those of the student."""
        return {"lr": self.learning_rate, "weight_decay": self.weight_decay}

    def needs_projector(self, from_width: int, to_width: int) -> bool:
        """Return whether a projector is needed.

        Args:
            from_width: hidden size of the student.
            to_width: hidden size of the teacher.

        Raises:
            DistillError: the kind is "none" and the widths differ.
        """
        if self.kind == "none" and from_width != to_width:
            raise DistillError(
                f"projectors is none, but the student's hidden states are {from_width} wide and the teacher's "
                f"{to_width}: remove projectors, or use a loss that needs no projector (hidden_relation)."
            )
        return self.kind in ("linear", "mlp") or (self.kind == "auto" and from_width != to_width)

    def check_channels(self, channels: Sequence[int] | None) -> None:
        """Check that the channels for the initialization are known.

        Args:
            channels: see `build`.

        Raises:
            DistillError: init is "selection", and they are not.
        """
        if self.init == "selection" and channels is None:
            raise DistillError(
                "projectors.init is selection, and the student was not made from this teacher by pruning its hidden "
                "size in this process, so which channels it kept is not known: use init orthogonal or identity."
            )

    def build(
        self, from_width: int, to_width: int, generator: torch.Generator, channels: Sequence[int] | None = None
    ) -> nn.Module:
        """Build a projector [N, from_width] -> [N, to_width].

        Args:
            from_width: hidden size of the student.
            to_width: hidden size of the teacher.
            generator: random state of the initialization.
            channels: of the teacher that the channels of the student were, [from_width]; None: not known.
        """
        self.check_channels(channels)
        layers: list[nn.Module] = [self._linear(from_width, to_width, generator, channels)]
        if self.kind == "mlp":
            layers += [nn.GELU(), self._linear(to_width, to_width, generator)]
        return Projector(*layers).requires_grad_(self.trainable)

    def _linear(
        self, from_width: int, to_width: int, generator: torch.Generator, channels: Sequence[int] | None = None
    ) -> nn.Linear:
        layer = nn.utils.skip_init(nn.Linear, from_width, to_width, bias=False)  # does not use the global random state
        with torch.no_grad():
            if self.init == "identity":
                nn.init.eye_(layer.weight)
            elif channels is not None and self.kind != "mlp" and self.init in ("auto", "selection"):
                layer.weight.zero_()
                layer.weight[list(channels), range(from_width)] = 1.0
            else:
                nn.init.orthogonal_(layer.weight, generator=generator)
        return layer


class Projector(nn.Sequential):
    """Layers that convert hidden states to the dtype of their weights."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [N, from_width] to [N, to_width]."""
        return super().forward(hidden.to(next(self.parameters()).dtype))


class LayerMixture(nn.Module):
    """Learned layer mapping: the share of each teacher layer for each student layer.

    shares = softmax(weight), [L_s, L_t]

    Each student layer starts with a share of 0.9 for the teacher layer of its pair, and equal shares for the others.

    Args:
        pairs: (student layer, teacher layer), those of `stretch`.
        n_teacher: L_t, number of teacher layers.

    Source: ALP-KD, arXiv 2012.14022.
    """

    def __init__(self, pairs: list[tuple[int, int]], n_teacher: int):
        super().__init__()
        weight = torch.zeros(len(pairs), n_teacher)
        for row, (_, layer) in enumerate(pairs):
            weight[row, layer] = math.log(9 * max(n_teacher - 1, 1))
        self.weight = nn.Parameter(weight)
        self.shares = weight.softmax(-1)  # not a buffer, so that it is not saved

    def forward(self) -> Tensor:
        """Return the shares, [L_s, L_t], whose rows sum to 1; `self.shares` has them without graph."""
        shares = self.weight.softmax(-1)
        self.shares = shares.detach()
        return shares
