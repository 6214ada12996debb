"""The table of losses. A function's keyword parameters are the options that a config or a recipe may set."""

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core.options import POSITIVE, option_problem, option_schema
from ..errors import DistillError, did_you_mean, raise_if_any

FEATURES = ("hidden", "attention", "values")
FEATURE_OPTIONS = {"layers": "stretch", "stack": None}  # of every loss on features: which layers, of which stack


@dataclass(frozen=True)
class Loss:
    """A registered loss.

    function: (student, teacher, targets, **options) -> [T], in nats per asked token for divergences
    needs:    what it looks at: "logits", or one kind of feature, or nothing of the teacher's
    project:  whether the student's hidden states are brought to the teacher's width first
    paper:    arXiv id
    options:  name -> default, read from the function's signature
    limits:   name -> range of an option, as keys of JSON Schema; see `options`
    gradient: its closed form, if it has one; see `gradient_of`
    sparse:   the same beside a sparse teacher
    """

    name: str
    function: Callable[..., Tensor]
    needs: tuple[str, ...]
    paper: str
    options: dict[str, Any]
    gradient: Callable[..., tuple[Tensor, Tensor]] | None = None
    sparse: Callable[..., tuple[Tensor, Tensor]] | None = None
    project: bool = False
    limits: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def option_schemas(self) -> dict[str, dict[str, Any]]:
        """Name -> JSON Schema of each option, those of all losses on features included."""
        known = self.options | (FEATURE_OPTIONS if self.feature else {})
        free = {} if not self.feature else FEATURE_OPTIONS  # the mapping of layers has its own check
        return {
            name: {"default": default} if name in free else option_schema(default, self.limits.get(name, {}))
            for name, default in known.items()
        }

    @property
    def feature(self) -> str | None:
        """The kind of feature that it compares; None for a loss on logits or labels."""
        return next((need for need in self.needs if need in FEATURES), None)

    def check(self, options: dict[str, Any]) -> None:
        """Refuse options that the function does not have, and values of the wrong type or out of range.

        Raises:
            DistillError: all of them at once.
        """
        known, problems = self.option_schemas, []
        for name, value in options.items():
            if name not in known:
                problems.append(f"Loss {self.name!r} has no option {name!r}{did_you_mean(name, known)}")
            elif problem := option_problem(name, value, known[name]):
                problems.append(f"Loss {self.name!r}: {problem}")
        raise_if_any(problems)


LOSSES: dict[str, Loss] = {}


def loss(
    name: str,
    needs: tuple[str, ...] = ("logits",),
    paper: str = "",
    project: bool = False,
    limits: dict[str, dict[str, Any]] | None = None,
) -> Callable[[Callable], Callable]:
    """Register a loss: `@loss("my_kl", needs=("logits",), paper="1503.02531")`.

    The function takes `(student, teacher, targets, *, options...)` and returns one number per asked token, [T], neither
    masked nor weighted nor averaged. A parameter called `temperature` gets the run's temperature, and the distiller
    multiplies by its square. What student and teacher are:

        needs ("logits",)     two `Signals`; needs () the same, and the teacher's may be None
        needs ("hidden",)     two tensors [N, H_s] and [N, H_t], the outputs of one pair of layers; with `project` the
                              student's is brought to H_t first
        needs ("attention",)  [N, h_s, S] and [N, h_t, S], rows of attention maps
        needs ("values",)     [B, h_s, S, H_s / h_s] and [B, h_t, S, H_t / h_t], values of the attention

    A loss on features returns [N], one number for each token of `targets`, and its term is the mean over the pairs of
    layers. An option takes values of its default's type; `limits` gives the range of some, such as
    `{"beta": {"minimum": 0}}`, by which configs and recipes are checked.

    Raises:
        DistillError: the name is taken or no identifier, needs are unknown or mixed, or the function swallows
            unknown options.
    """
    if not name.isidentifier():
        raise DistillError(
            f"A loss cannot be called {name!r}: logs and modules carry its name, so letters, digits and _ only."
        )
    if not set(needs) <= {"logits", *FEATURES} or len(needs) > 1:
        raise DistillError(
            f"Loss {name!r} needs {needs}; a loss needs nothing, or one of: logits, {', '.join(FEATURES)}."
        )

    def register(function: Callable) -> Callable:
        parameters = list(inspect.signature(function).parameters.values())[3:]
        if any(p.kind == p.VAR_KEYWORD for p in parameters):
            raise DistillError(
                f"Loss {name!r} takes **{parameters[-1].name}: name its options, so that typos are found."
            )
        if name in LOSSES and LOSSES[name].function.__qualname__ != function.__qualname__:
            raise DistillError(f"A loss {name!r} is registered already: choose another name.")
        options = {p.name: p.default for p in parameters}
        ranges = {"temperature": POSITIVE} | (limits or {})
        if unknown := ranges.keys() - options.keys() - {"temperature"}:
            raise DistillError(f"Loss {name!r} has limits for {', '.join(sorted(unknown))}, which it does not take.")
        LOSSES[name] = Loss(name, function, tuple(needs), paper, options, project=project, limits=ranges)
        return function

    return register


def register_gradient(of: Callable, sparse: bool = False) -> Callable[[Callable], Callable]:
    """Register the closed form of a registered loss, which the fused head uses in place of autograd.

    The function takes `(pair, **options)`, a `Pair` of logits [r, V] in float32 or better over the same V, and returns
    the loss [r] and its gradient by the student's logits, [r, V] in a tensor of its own (`pair.take()` lends one). With
    `sparse` it is for pairs whose teacher is `pair.sparse`.
    """

    def register(function: Callable) -> Callable:
        name = next(name for name, loss in LOSSES.items() if loss.function is of)
        closed: dict[str, Any] = {"sparse" if sparse else "gradient": function}
        LOSSES[name] = dataclasses.replace(LOSSES[name], **closed)
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
