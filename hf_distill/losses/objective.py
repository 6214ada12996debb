"""The objective: which losses, how much of each, at which temperature."""

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from ..core.logits import DenseLogits
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import check_layers
from . import Loss, get_loss
from .alignment import dense_logits
from .analytic_gradients import LogitPair
from .registry import FEATURE_OPTIONS

# Names of other values of a token: a term of such a name would be taken for them.
RESERVED_NAMES = (
    *("kl", "agreement", "accuracy", "measured", "asked", "aux", "peer_aux"),
    *("student_ce", "student_entropy", "teacher_ce", "teacher_entropy"),
)


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight * scale * loss(student, teacher, targets, **options)`.

    scale:  T^2 for a loss with a temperature, else 1
    layers: of a loss on features: the mapping, see `layers.map_layers`
    stack:  of a loss on features: "encoder" or "decoder" of a model that has both
    teacher: of several: the name of the one it follows; None: of the only one
    """

    name: str
    loss: Loss
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    layers: Any = None
    stack: str | None = None
    teacher: str | None = None

    @property
    def scale(self) -> float:
        """T^2, so that gradients keep their size as the temperature grows."""
        return self.options.get("temperature", 1.0) ** 2

    def __call__(self, student: Any, teacher: Any, targets: Targets) -> Tensor:
        """The scaled, unweighted loss of each asked token, [T]; see `losses.loss` for what student and teacher are."""
        values = self.loss.function(student, teacher, targets, **self.options)
        if values.shape != targets.labels.shape:
            raise DistillError(
                f"Loss {self.loss.name!r} returned shape {tuple(values.shape)}; it must return one number per asked "
                f"token, {tuple(targets.labels.shape)}, neither summed nor averaged."
            )
        return values * self.scale

    def analytic_gradient(self, pair: LogitPair | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """The closed form for a pair, if there is one."""
        if pair is None:
            return None
        return self.loss.gradient if pair.sparse is None else self.loss.sparse

    def loss_and_grad(self, student: Signals, teacher: Signals | None, targets: Targets, pair: LogitPair | None):
        """The same, and the gradient of its sum by the student's logits, [T, V], as (values, gradient, factor).

        The weighted term's gradient is factor * gradient: the factor is left to whoever adds gradients up.

        Args:
            student: signals with `Logits`.
            teacher: signals, or None.
            targets: the asked tokens.
            pair: the same logits for closed forms, if they apply; else autograd is asked.
        """
        if (analytic_gradient := self.analytic_gradient(pair)) is not None:
            values, gradient = analytic_gradient(pair, **self.options)
            return values * self.scale, gradient, self.weight * self.scale
        with torch.enable_grad():
            logits = dense_logits(student).detach().requires_grad_()
            values = self(Signals(DenseLogits(logits)), teacher, targets)
            (gradient,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), gradient, self.weight


def objective(
    alpha: float,
    temperature: float,
    divergence: str | dict = "forward_kl",
    losses: Iterable[dict] = (),
    label_smoothing: float = 0.0,
) -> list[Term]:
    """The terms of `alpha * soft + (1 - alpha) * hard + sum(weight * others)`.

    Args:
        alpha: weight of the soft term, in [0, 1].
        temperature: of the soft term, and of other terms that have one and do not set their own.
        divergence: name of the soft term's loss, or `{name, **options}`.
        losses: more terms, each `{name, weight, **options}`, and `teacher` where there are several.
        label_smoothing: of the hard term, in [0, 1].

    Raises:
        DistillError: a value out of range, an unknown loss or option; all of them at once.
    """
    problems: list[str] = []
    if not (_is_number(alpha) and 0 <= alpha <= 1):
        problems.append(
            f"alpha is {alpha!r}; it must be a number in [0, 1] (0: hard labels alone, 1: the teacher alone)"
        )
    if not (_is_number(temperature) and temperature > 0 and math.isfinite(temperature)):
        problems.append(f"temperature is {temperature!r}; it must be a positive number")
    raise_if_any(problems if not (_is_number(alpha) and _is_number(temperature)) else [])
    soft = divergence if isinstance(divergence, dict) else {"name": divergence}
    specs = [{**soft, "weight": alpha}, *losses]
    terms = [Term("hard", get_loss("cross_entropy"), 1 - alpha, {"label_smoothing": label_smoothing})]
    for i, spec in enumerate(specs):
        with collect_errors(problems):
            terms.append(_term(spec, temperature, "soft" if i == 0 else None))
    raise_if_any(problems)
    return _deduplicate_names([terms[1], terms[0], *terms[2:]])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _deduplicate_names(terms: list[Term]) -> list[Term]:
    """A loss that is used twice, or that is called as something else that is logged, gets a number behind its name."""
    taken = set(RESERVED_NAMES)
    result = []
    for term in terms:
        name = next(n for n in chain([term.name], (f"{term.name}_{i}" for i in count(2))) if n not in taken)
        taken.add(name)
        result.append(replace(term, name=name))
    return result


def repeated_names(terms: Iterable[Term]) -> list[str]:
    """What is wrong where losses of one's own are called as those that a teacher makes of the objective."""
    counts = Counter(term.name for term in terms)
    return [
        f"{number} losses are called {name!r}, as those of this teacher are: register yours under another name"
        for name, number in counts.items()
        if number > 1
    ]


def _term(spec: dict, temperature: float, name: str | None) -> Term:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise DistillError(f"A loss is written {{name: ..., weight: ..., options...}}; got {spec!r}")
    options = {k: v for k, v in spec.items() if k not in ("name", "weight", "teacher")}
    loss, weight, teacher = get_loss(spec["name"]), spec.get("weight", 1.0), spec.get("teacher")
    loss.check(options)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise DistillError(f"Loss {loss.name!r} has weight {weight!r}; it must be a number")
    if teacher is not None and not (isinstance(teacher, str) and loss.needs and name is None):
        raise DistillError(
            f"Loss {loss.name!r} has teacher {teacher!r}; it is the name of a teacher, of a loss among `losses` that "
            "looks at one"
        )
    if name == "soft" and "logits" not in loss.needs:
        raise DistillError(f"divergence is {loss.name!r}, which does not look at the teacher's logits")
    layers, stack = (options.pop(k, v) if loss.feature else None for k, v in FEATURE_OPTIONS.items())
    if loss.feature:
        check_layers(layers)
        if stack not in (None, "encoder", "decoder"):
            raise DistillError(f"Loss {loss.name!r} has stack {stack!r}; it must be encoder or decoder")
    if "temperature" in loss.options:
        options.setdefault("temperature", temperature)
        if not options["temperature"] > 0:
            raise DistillError(f"Loss {loss.name!r} has temperature {options['temperature']}; it must be positive")
    name = name or (loss.name if teacher is None else f"{loss.name}_{teacher}")
    return Term(name, loss, weight, options, layers, stack, teacher)
