"""Signals: the outputs of a model that losses read, reduced to the target tokens. Shape letters: see `targets.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .logits import DenseLogits, LazyLogits, MultiTeacherLogits, SparseLogProbs


@dataclass(frozen=True)
class FeatureKey:
    """A feature of one layer of a model.

    kind:  "hidden": what the block puts out, [N, H]
           "attention": its attention's maps, rows of the N tokens, [N, h, S]
           "values": its attention's values, [B, h, S, H / h]
    layer: index of the block
    stack: "encoder" or "decoder" of a model that has both, else None
    teacher: of several teachers: whose model it is
    """

    kind: str
    layer: int
    stack: str | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Signals:
    """What a model said about a batch.

    logits:   of the asked tokens; of several teachers by name; None: it says nothing about them
    features: of the taps that were asked for
    """

    logits: DenseLogits | LazyLogits | SparseLogProbs | MultiTeacherLogits | None
    features: Mapping[FeatureKey, Tensor] = field(default_factory=dict)
