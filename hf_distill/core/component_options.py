"""Options of projectors and views, which recipes and Python code validate by the same models. Imports no torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator

from ..errors import did_you_mean, raise_if_any
from .defaults import PROJECTOR_INIT, PROJECTOR_KIND, SPAN_LENGTH_TOKENS
from .strict_model import StrictModel


class ProjectorOptions(StrictModel):
    """The projectors that map hidden states of the student to the width of the teacher."""

    kind: Literal["auto", "linear", "mlp", "none"] = Field(
        PROJECTOR_KIND,
        description="Kind of projector. auto uses a linear projector where the widths differ. "
        f"Default: {PROJECTOR_KIND}.",
    )
    init: Literal["auto", "orthogonal", "identity", "selection"] = Field(
        PROJECTOR_INIT,
        description="Initialization of the projector weights. selection: each channel of a student whose width was "
        "pruned starts at the channel of the teacher that it was. auto: selection for such a student, else orthogonal. "
        f"Default: {PROJECTOR_INIT}.",
    )
    trainable: bool = Field(
        True, description="Whether the projectors are trained; false keeps their initialization. Default: true."
    )
    learning_rate: float | None = Field(
        None, ge=0, description="Learning rate of the projectors, at least 0. Default (null): train.learning_rate."
    )
    weight_decay: float | None = Field(
        None, ge=0, description="Weight decay of the projectors, at least 0. Default (null): train.weight_decay."
    )

    @model_validator(mode="after")
    def _check_combination(self) -> Self:
        if self.kind == "mlp" and self.init == "selection":
            raise ValueError("init selection is a matrix, and kind is mlp: use kind linear or auto, or another init")
        if not self.trainable and (self.learning_rate is not None or self.weight_decay is not None):
            raise ValueError("trainable is false, so learning_rate and weight_decay have no effect: remove them")
        return self


class ViewOptions(StrictModel):
    """A modified view of the batch for the teacher or the student; see docs/online-and-self-distillation.md."""

    token_dropout: float = Field(
        0.0, ge=0, lt=1, description="Share of tokens replaced by a filler token, from 0 to below 1. Default: 0."
    )
    span_deletion: float = Field(
        0.0, ge=0, lt=1, description="Share of the context's tokens that are masked, from 0 to below 1. Default: 0."
    )
    span_length: int = Field(
        SPAN_LENGTH_TOKENS,
        gt=0,
        description="Number of consecutive tokens that are masked together, at least 1. "
        f"Default: {SPAN_LENGTH_TOKENS}.",
    )
    prepend_context_tokens: int = Field(
        0, ge=0, description="Number of tokens of another row that precede each row, at least 0. Default: 0."
    )
    paraphrase: bool = Field(
        False, description="Use the column `paraphrase` of the data instead of `prompt`. Default: false."
    )

    @model_validator(mode="after")
    def _check_not_empty(self) -> Self:
        if not (self.token_dropout or self.span_deletion or self.prepend_context_tokens or self.paraphrase):
            raise ValueError(
                "the view does not change the batch: set token_dropout, span_deletion, prepend_context_tokens or "
                "paraphrase"
            )
        return self


@contextmanager
def option_errors(component: str, known: list[str]) -> Iterator[None]:
    """Raise pydantic's errors as a DistillError that lists all problems.

    Args:
        component: what the options belong to, such as "projectors".
        known: names of the options.
    """
    try:
        yield
    except ValidationError as error:
        problems = []
        for item in error.errors():
            message = item["msg"].removeprefix("Value error, ").replace("Input should", "must")
            option = str(item["loc"][0]) if item["loc"] else ""
            if item["type"] == "extra_forbidden":
                problems.append(f"{component} has no option {option!r}{did_you_mean(option, known)}")
            elif option:
                problems.append(f"{component} has {option} {item['input']!r}; it {message}")
            else:
                problems.append(f"{component}: {message}")
        raise_if_any(problems)
