"""The table of losses. A function's keyword parameters are the options that a config or a recipe may set."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import DistillError, did_you_mean


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    function: (student, teacher, targets, **options) -> [T], in nats per asked token for divergences
    needs:    what it asks of the teacher: "logits", or nothing
    paper:    arXiv id
    options:  name -> default, read from the function's signature
    gradient: its closed form, if it has one; see `gradient_of`
    """

    name: str
    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    paper: str
    options: dict[str, Any]
    gradient: Callable[..., tuple[Tensor, Tensor]] | None = None

    def check(self, options: dict[str, Any]) -> None:
        """Refuse options that the function does not have.

        Raises:
            DistillError: an unknown option.
        """
        for name in options:
            if name not in self.options:
                raise DistillError(f"Loss {self.name!r} has no option {name!r}{did_you_mean(name, self.options)}")


LOSSES: dict[str, Loss] = {}


def loss(name: str, needs: tuple[str, ...] = ("logits",), paper: str = "") -> Callable[[Callable], Callable]:
    """Register a loss: `@loss("my_kl", needs=("logits",), paper="1503.02531")`.

    The function takes `(student, teacher, targets, *, options...)`, two `Signals` (the teacher's is None where `needs`
    is empty) and `Targets`, and returns one number per asked token, [T], neither masked nor weighted nor averaged. A
    parameter called `temperature` gets the run's temperature, and the distiller multiplies by its square.

    Raises:
        DistillError: the name is taken, or the function swallows unknown options with **kwargs.
    """

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise DistillError(
                f"Loss {name!r} takes **{parameters[-1].name}: name its options, so that typos are found."
            )
        if name in LOSSES and LOSSES[name].function.__qualname__ != function.__qualname__:
            raise DistillError(f"A loss {name!r} is registered already: choose another name.")
        LOSSES[name] = Loss(name, function, tuple(needs), paper, {p.name: p.default for p in parameters})
        return function

    return register


def gradient_of(of: Callable) -> Callable[[Callable], Callable]:
    """Register the closed form of a registered loss, which the fused head uses in place of autograd.

    The function takes `(pair, **options)`, a `Pair` of logits [r, V] in float32 or better over the same V, and returns
    the loss [r] and its gradient by the student's logits, [r, V] in a tensor of its own (`pair.take()` lends one).
    """

    def register(function: Callable) -> Callable:
        name = next(name for name, loss in LOSSES.items() if loss.function is of)
        LOSSES[name] = dataclasses.replace(LOSSES[name], gradient=function)
        return function

    return register


def get_loss(name: str) -> Loss:
    """The registered loss of that name.

    Raises:
        DistillError: there is none; says which is near.
    """
    if name not in LOSSES:
        raise DistillError(f"Unknown loss {name!r}{did_you_mean(name, LOSSES)}")
    return LOSSES[name]
