"""Signals: the outputs of a model that losses read, reduced to the target tokens. Shape letters: see `targets.py`."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from .teacher_logits import TeacherLogits


@dataclass(frozen=True)
class FeatureKey:
    """The key of one feature of one layer of a model.

    kind:    "hidden": the layer's output hidden states of the N tokens, [N, H]
             "attention": the attention maps' rows of the N tokens, [N, h, S]
             "values": the attention's values, [B, h, S, H / h]
             "embedding": the last hidden states of each row, pooled, [B, H]
    layer:   index of the layer, counted from 0
    stack:   "encoder" or "decoder" of a model that has both, "embedding" for embeddings, else None
    teacher: name of the teacher if there are several, else None
    pooling: of an embedding: one of `POOLINGS`, else None
    """

    kind: str
    layer: int
    stack: str | None = None
    teacher: str | None = None
    pooling: str | None = None


@dataclass(frozen=True)
class Signals:
    """The outputs of a model for a batch, reduced to what losses read.

    logits:   of the target tokens, [T, V] in one of the representations of `logits.py`; of a teacher of another
              tokenizer, `CrossTokenizerLogits`, of which losses read `AlignedLogits`; None if there are none
    features: the requested features, by their keys
    """

    logits: TeacherLogits | None
    features: Mapping[FeatureKey, Tensor] = field(default_factory=dict)
