"""The section `student.from_teacher` of a recipe: a student that is pruned from its teacher. Imports no torch."""

import re
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ..core.defaults import CALIBRATION_ROWS, IMPORTANCE_MEASURE
from ..core.pruned_sizes import shape_text
from ..core.strict_model import StrictModel
from .vocabulary import Vocabulary

WIDTHS = ("hidden_size", "intermediate_size", "moe_intermediate_size", "num_attention_heads", "num_experts")
_DEPTHS = ("keep_layers", "layers", "decoder_layers", "encoder_layers")
LayerIndex = Annotated[int, Field(ge=0)]
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


class FromTeacher(StrictModel):
    """Pruning: the student consists of some of the teacher's layers, hidden channels, neurons, heads or experts."""

    keep_layers: int | None = Field(
        None,
        gt=0,
        description="Number of layers to keep: those that change the hidden states most (block influence, 2403.03853). "
        "Give keep_layers or layers, not both. Default (null): all layers.",
    )
    layers: list[LayerIndex] | None = Field(
        None, min_length=1, description="Indices of the layers to keep, from 0. Default (null): see keep_layers."
    )
    decoder_layers: list[LayerIndex] | None = Field(
        None,
        min_length=1,
        description="For a model with an encoder and a decoder: indices of the decoder layers to keep, from 0. Default "
        "(null): all.",
    )
    encoder_layers: list[LayerIndex] | None = Field(
        None,
        min_length=1,
        description="For a model with an encoder and a decoder: indices of the encoder layers to keep, from 0. Default "
        "(null): all.",
    )
    hidden_size: int | None = Field(
        None, gt=0, description="Number of hidden channels to keep, the same in all layers. Default (null): all."
    )
    intermediate_size: int | None = Field(
        None, gt=0, description="Number of neurons to keep in the MLP of each layer. Default (null): all."
    )
    moe_intermediate_size: int | None = Field(
        None,
        gt=0,
        description="Number of neurons to keep in each expert, for a mixture of experts whose config has this size. "
        "Default (null): all.",
    )
    num_attention_heads: int | None = Field(
        None,
        gt=0,
        description="Number of query heads to keep in each layer. Query heads that share a key-value head are kept or "
        "removed together, so it must be a multiple of their number. Default (null): all.",
    )
    num_experts: int | None = Field(
        None, gt=0, description="Number of experts to keep in each layer of a mixture of experts. Default (null): all."
    )
    vocab: Vocabulary | None = Field(
        None,
        description="Keep some of the tokens only, in the tokenizer, the embedding and the output head. The teacher is "
        "compared over these. Default (null): all tokens.",
    )
    by: Literal["activation", "weight"] = Field(
        IMPORTANCE_MEASURE,
        description="How channels, neurons, heads and experts are selected: activation keeps those with the largest "
        "mean absolute activation over calibration rows (2407.14679), weight those with the largest weights. "
        f"Default: {IMPORTANCE_MEASURE}.",
    )
    calibration_rows: int = Field(
        CALIBRATION_ROWS,
        gt=0,
        description="Number of training rows that measure block influence and activations. "
        f"Default: {CALIBRATION_ROWS}.",
    )
    target_parameters: int | str | None = Field(
        None,
        description="Number of parameters, such as 80M or 1.5B, in place of sizes: `hf-distill prune` compares shapes "
        "with at most as many parameters, and says which sizes to set. Default (null): the sizes of the other keys.",
    )

    @property
    def prunes_width(self) -> bool:
        """Whether channels, neurons, heads or experts are removed."""
        return any(getattr(self, name) is not None for name in WIDTHS)

    @property
    def parameter_budget(self) -> int | None:
        """`target_parameters` as a number."""
        return None if self.target_parameters is None else parameter_count(self.target_parameters)

    @property
    def num_layers(self) -> int | None:
        """Number of layers that are kept; None: all."""
        return len(self.layers) if self.layers else self.keep_layers

    @property
    def text(self) -> str:
        """The sizes in words, such as "20 layers, hidden size 448"; see `shape_text`."""
        if self.target_parameters is not None:
            return f"at most {self.target_parameters} parameters"
        stacks = {"decoder layers": self.decoder_layers, "encoder layers": self.encoder_layers}
        parts = [f"{len(kept)} {name}" for name, kept in stacks.items() if kept]
        tokens = None if self.vocab is None else self.vocab.size
        parts += [shape_text({"layers": self.num_layers, **self.widths(), "vocab_size": tokens})]
        parts += ["the tokens that the data uses"] if self.vocab is not None and tokens is None else []
        return ", ".join(filter(None, parts))

    def widths(self) -> dict[str, int]:
        """Return the sizes of the student's width that are set, by name."""
        return {name: value for name in WIDTHS if (value := getattr(self, name)) is not None}

    @field_validator("target_parameters")
    @classmethod
    def _check_target(cls, value: int | str | None) -> int | str | None:
        if value is not None:
            parameter_count(value)
        return value

    @field_validator("layers", "decoder_layers", "encoder_layers")
    @classmethod
    def _check_layers(cls, value: list[int] | None) -> list[int] | None:
        if repeated := sorted({layer for layer in value or () if (value or []).count(layer) > 1}):
            raise ValueError(f"give each layer to keep once; repeated: {', '.join(map(str, repeated))}")
        return value

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        depths = [name for name in _DEPTHS if getattr(self, name)]
        if self.target_parameters is not None:
            if others := [*depths, *self.widths(), *(["vocab"] if self.vocab else [])]:
                raise ValueError(
                    f"target_parameters lets `hf-distill prune` choose the sizes: remove {', '.join(others)}, or "
                    "target_parameters"
                )
            return self
        if not depths and not self.prunes_width and self.vocab is None:
            raise ValueError(
                f"give keep_layers or layers, a width ({', '.join(WIDTHS)}), vocab, several of them, or "
                "target_parameters; "
                "for a model with an encoder and a decoder, decoder_layers, encoder_layers or both"
            )
        if len(depths) > 1 and {*depths} != {"decoder_layers", "encoder_layers"}:
            raise ValueError(
                "give either keep_layers or layers; for a model with an encoder and a decoder, decoder_layers, "
                "encoder_layers or both"
            )
        if self.prunes_width and (self.decoder_layers or self.encoder_layers):
            raise ValueError(
                f"{', '.join(self.widths())}: the width of a model with an encoder and a decoder cannot be pruned; "
                "remove it"
            )
        if self.vocab is not None and (self.decoder_layers or self.encoder_layers):
            raise ValueError(
                "vocab: the vocabulary of a model with an encoder and a decoder cannot be trimmed; remove it"
            )
        if self.by == "weight" and not self.prunes_width:
            raise ValueError(
                f"by: weight selects what is kept of a width ({', '.join(WIDTHS)}), and none is set: remove by; "
                "layers are always selected by block influence"
            )
        return self


def parameter_count(value: int | str) -> int:
    """Return a number of parameters that is written as 80M, 1.5B, 500K or a whole number.

    Raises:
        ValueError: it is not.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", str(value).strip().upper())
    count = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not match or not 0 < count < 10**15:
        raise ValueError("write a number of parameters above 0, such as 80M, 1.5B or 81000000")
    return count
