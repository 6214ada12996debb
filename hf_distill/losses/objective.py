"""The objective: a weighted sum of losses, `alpha * soft + (1 - alpha) * hard + sum(weight * other losses)`."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from ..core.defaults import DIVERGENCE
from ..core.logits import DenseLogits
from ..core.loss_kinds import EMBEDDING
from ..core.signals import Signals
from ..core.targets import Targets
from ..errors import DistillError, collect_errors, raise_if_any
from ..layers import check_layers
from . import Loss, get_loss
from .alignment import dense_logits
from .analytic_gradients import BlockLogits
from .embedding import EMBEDDING_SIMILARITY
from .registry import EMBEDDING_OPTIONS, FEATURE_OPTIONS

# Names of other values that are logged for each target token; no term may have one of them.
RESERVED_NAMES = (
    *("kl", "agreement", "teacher_mse", "accuracy", "measured", "target_tokens", "aux", "peer_aux"),
    *("student_ce", "student_entropy", "teacher_ce", "teacher_entropy"),
    EMBEDDING_SIMILARITY,
    *("measured_chunks", "chunk_kl", "chunk_agreement", "chunk_bytes", "student_chunk_nats", "teacher_chunk_nats"),
)


@dataclass(frozen=True)
class Term:
    """One term of the objective: `weight * T^2 * loss(student, teacher, targets, **options)`.

    name:      name of the term in logs
    loss:      registered loss
    weight:    factor of the term in the objective
    options:   keyword arguments of the loss function
    layers:    of a loss on features: the layer mapping, see `layers.map_layers`
    stack:     of a loss on features: "encoder" or "decoder" of a model that has both; "embedding" of one on embeddings
    teacher:   name of the teacher that the term reads if there are several, else None
    origin:    author of the tokens that the term is for, one of `ORIGINS`; None: any
    by_origin: origin -> the term of the tokens of this author, with the same name; tokens of others have this term
    pooling:   of a loss on embeddings: how student and teacher pool their hidden states, each one of `POOLINGS`
    """

    name: str
    loss: Loss
    weight: float
    options: dict[str, Any] = field(default_factory=dict)
    layers: Any = None
    stack: str | None = None
    teacher: str | None = None
    origin: str | None = None
    by_origin: Mapping[str, "Term"] = field(default_factory=dict)
    pooling: tuple[str, str] | None = None

    def of_origin(self, origin: str) -> "Term":
        """Return the term of the tokens of an author."""
        return self.by_origin.get(origin, self)

    def with_share(self, name: str, teacher: str | None, share: float) -> "Term":
        """Return the term for one of several teachers, with a share of the weight; also those of the origins."""
        by_origin = {origin: term.with_share(name, teacher, share) for origin, term in self.by_origin.items()}
        return replace(self, name=name, teacher=teacher, weight=self.weight * share, by_origin=by_origin)

    @property
    def temperature_squared(self) -> float:
        """T^2 for a loss with a temperature, so that gradients keep their size as the temperature grows; else 1."""
        return self.options.get("temperature", 1.0) ** 2

    def __call__(self, student: Signals | Tensor, teacher: Signals | Tensor | None, targets: Targets) -> Tensor:
        """Return the scaled, unweighted loss of each target token, [T].

        Args:
            student: signals, or a feature; see `losses.loss`.
            teacher: signals, or a feature; see `losses.loss`.
            targets: T target tokens.

        Raises:
            DistillError: the loss function returns another shape.
        """
        values = self.loss.function(student, teacher, targets, **self.options)
        if values.shape != (len(targets),):
            raise DistillError(
                f"Loss {self.loss.name!r} returned shape {tuple(values.shape)}; it must return one number for each "
                f"target token, shape {(len(targets),)}, neither summed nor averaged."
            )
        return values * self.temperature_squared

    def analytic_gradient(self, block: BlockLogits | None) -> Callable[..., tuple[Tensor, Tensor]] | None:
        """Return the loss's analytic gradient for the logits of a block; None if it has none.

        There is none either if the loss compares chunks and the teacher has the student's tokenizer, or the reverse:
        the loss function raises an error then.
        """
        if block is None or self.loss.compares_chunks != (block.aligned_teacher is not None):
            return None
        return self.loss.gradient_fn if block.sparse_teacher is None else self.loss.sparse_gradient_fn

    def loss_and_grad(
        self, student: Signals, teacher: Signals | None, targets: Targets, block: BlockLogits | None
    ) -> tuple[Tensor, Tensor, float]:
        """Return the loss of each target token and its gradient with respect to the student logits.

        Args:
            student: signals with the student logits [T, V].
            teacher: signals with the teacher logits, or None.
            targets: T target tokens.
            block: the same logits, for an analytic gradient; None uses autograd.

        Returns:
            (values, gradient, factor): the scaled, unweighted loss [T]; a gradient [T, V]; and the factor by which the
            caller multiplies it to get the gradient of the weighted term.
        """
        if (analytic_gradient := self.analytic_gradient(block)) is not None:
            values, gradient = analytic_gradient(block, **self.options)
            return values * self.temperature_squared, gradient, self.weight * self.temperature_squared
        with torch.enable_grad():
            logits = dense_logits(student).detach().requires_grad_()
            values = self(Signals(DenseLogits(logits)), teacher, targets)
            (gradient,) = torch.autograd.grad(values.sum(), logits)
        return values.detach(), gradient, self.weight


def objective(
    alpha: float,
    temperature: float,
    divergence: str | dict = DIVERGENCE,
    losses: Iterable[dict] = (),
    label_smoothing: float = 0.0,
    hard_loss: str | None = "cross_entropy",
) -> list[Term]:
    """Build the terms of `alpha * soft + (1 - alpha) * hard + sum(weight * others)`.

    Args:
        alpha: weight of the soft term (the divergence), in [0, 1]; the hard term has 1 - alpha.
        temperature: T of the soft term, and of other terms that have a temperature and do not set it.
        divergence: name of the soft term's loss, or `{name, **options}`.
        losses: other terms, each `{name, weight, **options}`; with several teachers also `teacher`.
        label_smoothing: of the hard term, in [0, 1].
        hard_loss: name of the hard term's loss, cross entropy or that of another output type; None: there are no
            labels, and no hard term.

    Returns:
        the soft term, the hard term, the other terms.

    Raises:
        DistillError: a value is out of range, or a loss or option is unknown; the message names all problems.
    """
    problems: list[str] = []
    if not (_is_number(alpha) and 0 <= alpha <= 1):
        problems.append(f"alpha is {alpha!r}; it must be a number in [0, 1] (0: only the labels, 1: only the teacher)")
    if not (_is_number(temperature) and temperature > 0 and math.isfinite(temperature)):
        problems.append(f"temperature is {temperature!r}; it must be a positive number")
    if not (_is_number(label_smoothing) and 0 <= label_smoothing <= 1):
        problems.append(f"label_smoothing_factor is {label_smoothing!r}; it must be a number in [0, 1]")
    raise_if_any(problems if not (_is_number(alpha) and _is_number(temperature)) else [])
    soft = divergence if isinstance(divergence, dict) else {"name": divergence}
    specs = [{**soft, "weight": alpha}, *losses]
    hard, terms = None if hard_loss is None else get_loss(hard_loss), list[Term]()
    smooths = hard is not None and "label_smoothing" in hard.options
    if label_smoothing and not smooths:
        which = "there are no labels" if hard is None else f"the hard loss {hard_loss} has no label smoothing"
        problems.append(f"label_smoothing_factor is {label_smoothing}, and {which}: set it to 0")
    for i, spec in enumerate(specs):
        with collect_errors(problems):
            terms.append(_term(spec, temperature, "soft" if i == 0 else None))
    raise_if_any(problems)
    if hard is not None:
        terms.insert(1, Term("hard", hard, 1 - alpha, {"label_smoothing": label_smoothing} if smooths else {}))
    return _deduplicate_names(terms)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _deduplicate_names(terms: list[Term]) -> list[Term]:
    """Append a number to the name of a term that an earlier term or another logged value already has."""
    used_names = set(RESERVED_NAMES)
    result = []
    for term in terms:
        name = next(n for n in chain([term.name], (f"{term.name}_{i}" for i in count(2))) if n not in used_names)
        used_names.add(name)
        result.append(replace(term, name=name))
    return result


def repeated_names(terms: Iterable[Term]) -> list[str]:
    """Return an error message for each name that several terms have, those that the teacher adds included."""
    counts = Counter(term.name for term in terms)
    return [
        f"{number} losses have the name {name!r}, which this teacher uses for its own losses: register your loss under "
        "another name"
        for name, number in counts.items()
        if number > 1
    ]


def _term(spec: dict, temperature: float, name: str | None) -> Term:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise DistillError(f"A loss must be a mapping {{name: ..., weight: ..., options...}}; got {spec!r}")
    options = {k: v for k, v in spec.items() if k not in ("name", "weight", "teacher")}
    is_soft = name == "soft"
    loss = get_loss(spec["name"], "divergence" if is_soft else "", of_logits=is_soft)
    weight, teacher = spec.get("weight", 1.0), spec.get("teacher")
    loss.check(options)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise DistillError(f"Loss {loss.name!r} has weight {weight!r}; it must be a number")
    if teacher is not None and not (isinstance(teacher, str) and loss.compares and name is None):
        raise DistillError(
            f"Loss {loss.name!r} has teacher {teacher!r}; `teacher` must be the name of a teacher, and only an entry "
            "of `losses` whose loss reads a teacher may have it"
        )
    if is_soft and "logits" not in loss.compares and not loss.compares_chunks and loss.feature != EMBEDDING:
        raise DistillError(
            f"divergence is {loss.name!r}, which does not read the teacher's logits: use a divergence such as "
            "forward_kl, and put this loss into `losses`"
        )
    if loss.feature == EMBEDDING:
        pooling, of_teacher = (options.pop(k, v) for k, v in EMBEDDING_OPTIONS.items())
        name = name or (loss.name if teacher is None else f"{loss.name}_{teacher}")
        poolings = (pooling, of_teacher or pooling)
        return Term(name, loss, weight, options, stack=EMBEDDING, teacher=teacher, pooling=poolings)
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
