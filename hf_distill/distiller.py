"""The step: one batch in, one loss out. A plain object that runs without a Trainer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import DistillError
from .forward import forward
from .losses import Loss, get_loss
from .signals import Signals, Targets
from .tasks import bare, task_of
from .teachers import Teacher


@dataclass(frozen=True)
class Term:
    """One summand of the objective: `weight * scale * loss(student, teacher, targets, **options)`.

    scale: T^2 for a loss with a temperature, else 1
    """

    name: str
    loss: Loss
    weight: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> float:
        """T^2, so that gradients keep their size as the temperature grows."""
        return self.options.get("temperature", 1.0) ** 2

    def __call__(self, student: Signals, teacher: Signals | None, targets: Targets) -> Tensor:
        """The scaled, unweighted loss of each asked token, [T]."""
        values = self.loss.function(student, teacher, targets, **self.options)
        if values.shape != targets.labels.shape:
            raise DistillError(
                f"Loss {self.loss.name!r} returned shape {tuple(values.shape)}; it must return one number per asked "
                f"token, {tuple(targets.labels.shape)}, neither summed nor averaged."
            )
        return values * self.scale


def objective(
    alpha: float,
    temperature: float,
    divergence: str = "forward_kl",
    losses: Iterable[dict] = (),
    label_smoothing: float = 0.0,
) -> list[Term]:
    """The terms of `alpha * soft + (1 - alpha) * hard + sum(weight * others)`.

    Args:
        alpha: weight of the soft term, in [0, 1].
        temperature: of the soft term, and of other terms that have one and do not set their own.
        divergence: name of the soft term's loss.
        losses: more terms, each `{name, weight, **options}`.
        label_smoothing: of the hard term, in [0, 1].

    Raises:
        DistillError: a value out of range, an unknown loss or option; all of them at once.
    """
    problems = []
    if not 0 <= alpha <= 1:
        problems.append(f"alpha is {alpha}; it must lie in [0, 1] (0: hard labels alone, 1: the teacher alone)")
    if not (temperature > 0 and math.isfinite(temperature)):
        problems.append(f"temperature is {temperature}; it must be a positive number")
    specs = [{"name": divergence, "weight": alpha}, *losses]
    terms = [Term("hard", get_loss("cross_entropy"), 1 - alpha, {"label_smoothing": label_smoothing})]
    for i, spec in enumerate(specs):
        try:
            terms.append(_term(spec, temperature, "soft" if i == 0 else None))
        except DistillError as error:
            problems.append(str(error))
    if problems:
        raise DistillError("; ".join(problems))
    return [terms[1], terms[0], *terms[2:]]


def _term(spec: dict, temperature: float, name: str | None) -> Term:
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        raise DistillError(f"A loss is written {{name: ..., weight: ..., options...}}; got {spec!r}")
    options = {k: v for k, v in spec.items() if k not in ("name", "weight")}
    loss, weight = get_loss(spec["name"]), spec.get("weight", 1.0)
    loss.check(options)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise DistillError(f"Loss {loss.name!r} has weight {weight!r}; it must be a number")
    if name == "soft" and "logits" not in loss.needs:
        raise DistillError(f"divergence is {loss.name!r}, which does not look at the teacher's logits")
    if "temperature" in loss.options:
        options.setdefault("temperature", temperature)
        if not options["temperature"] > 0:
            raise DistillError(f"Loss {loss.name!r} has temperature {options['temperature']}; it must be positive")
    return Term(name or loss.name, loss, weight, options)


@dataclass(frozen=True)
class Step:
    """What a step found.

    loss:      [] the objective, sum over asked tokens / num_items, with its graph
    per_token: name -> [T], detached: each term ("soft", "hard", ...) as `scale * loss`, and statistics if asked for
    targets:   the asked tokens
    outputs:   the student's outputs
    """

    loss: Tensor
    per_token: dict[str, Tensor]
    targets: Targets
    outputs: Any


class Distiller:
    """The objective applied to batches.

    L = sum over asked tokens of sum(weight * T^2 * loss) / num_items, with the terms of `objective`

    Args:
        terms: see `objective`.
    """

    def __init__(self, terms: list[Term]):
        self.terms = terms

    def __call__(
        self,
        student: nn.Module,
        teacher: Teacher,
        inputs: dict,
        num_items: Tensor | int | None = None,
        keep_logits: bool = False,
        statistics: bool = False,
    ) -> Step:
        """One forward of both models and their loss.

        Args:
            student: the model as prepared (DDP and other wrappers included).
            teacher: a prepared teacher.
            inputs: the collator's batch with `labels`.
            num_items: asked tokens of the whole global batch; None: those of this batch.
            keep_logits: keep the student's logits of all positions in `outputs`.
            statistics: also `kl` (T = 1), `agreement`, `student_ce`, `teacher_ce` per token.

        Raises:
            DistillError: labels missing, not ids, or outside the student's vocabulary.
        """
        model = bare(student)
        targets = Targets.from_batch(inputs, task_of(model).shift)
        told = teacher(inputs, targets)
        logits, outputs = forward(student, inputs, targets, keep_logits)
        targets.check_ids(logits.vocab_size)
        said = Signals(logits)

        count = torch.as_tensor(len(targets) if num_items is None else num_items, device=logits.values.device)
        per_token, total = {}, 0.0
        for term in self.terms:
            with torch.set_grad_enabled(torch.is_grad_enabled() and term.weight != 0):
                values = term(said, told, targets)
            per_token[term.name] = values.detach()
            if term.weight != 0:
                total = total + term.weight * values.sum()
        loss = (total + _router_loss(model, outputs) * len(targets)) / count.clamp(min=1)
        if statistics:
            per_token |= _statistics(said, told, targets)
        return Step(loss, per_token, targets, outputs)


def _router_loss(model: nn.Module, outputs: Any) -> Tensor | float:
    """A mixture-of-experts router's load-balancing loss, as the model itself would add it."""
    aux = outputs.get("aux_loss")
    return 0.0 if aux is None else model.config.router_aux_loss_coef * aux


@torch.no_grad()
def _statistics(student: Signals, teacher: Signals, targets: Targets) -> dict[str, Tensor]:
    s, t = student.logits.project(), teacher.logits.project()
    labels = targets.labels
    known = labels < t.shape[-1]
    teacher_ce = torch.full_like(labels, math.inf, dtype=t.dtype)
    teacher_ce[known] = torch.nn.functional.cross_entropy(t[known], labels[known], reduction="none")
    return {
        "kl": get_loss("forward_kl").function(student, teacher),
        "agreement": (s.argmax(-1) == t.argmax(-1)).to(s.dtype),
        "student_ce": torch.nn.functional.cross_entropy(s, labels, reduction="none"),
        "teacher_ce": teacher_ce,
    }
