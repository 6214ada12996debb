"""Whether a student is close to its teacher at all: against baselines, itself before training, and the control."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, log
from typing import Any

from .agreement import Agreement

APART = 0.1  # nats/token: a student this close to its teacher has learnt from it
CLOSER = 0.1  # share of the KL before training by which training must have lowered it


@dataclass(frozen=True)
class HeldOut:
    """A model's held-out metrics.

    nll: of the labels, nats/token
    kl:  KL(teacher || model) at T = 1, nats/token; None where it was not measured
    """

    nll: float
    kl: float | None

    @classmethod
    def of(cls, metrics: Any) -> "HeldOut | None":
        """From the metrics of one model in a run's evidence; None where they hold no perplexity."""
        perplexity = _number(metrics, "perplexity")
        if perplexity is None or perplexity <= 0:
            return None
        return cls(log(perplexity), _number(metrics, "kl"))


@dataclass(frozen=True)
class References:
    """Measurements on all held-out rows of a run; None: there is none.

    before:  the student before training
    control: the same student, trained on hard labels alone
    after:   the student that is diagnosed; None: what is measured for the diagnosis stands in for it
    """

    before: HeldOut | None = None
    control: HeldOut | None = None
    after: HeldOut | None = None

    @classmethod
    def of_evidence(cls, evidence: Any, name: str) -> "References":
        """From results.json.

        Args:
            evidence: its content; measurements that are missing there are None.
            name: of the model that is diagnosed: "student", "control", or anything else.
        """
        models = evidence.get("models") if isinstance(evidence, Mapping) else None
        models = models if isinstance(models, Mapping) else {}
        measured = {key: HeldOut.of(models.get(key)) for key in ("before", "student", "control")}
        control = None if name == "control" else measured["control"]
        return cls(measured["before"], control, measured.get(name))


NO_REFERENCES = References()


def signs_of_distance(found: Agreement, references: References, alpha: float) -> list[str]:
    """Why a student is not close to its teacher: one phrase for each comparison that it loses.

    A unigram baseline knows only how often each token occurs; a uniform distribution gives all ids the same.

    Args:
        found: of the pair.
        references: what else the student is compared with.
        alpha: of the objective; with 0 only the labels count.
    """
    after = references.after or HeldOut(found.student_nll, found.kl)
    kl = found.kl if after.kl is None else after.kl
    if alpha and kl <= APART:
        return []
    signs = []
    if found.student_nll >= found.counts_nll:
        signs.append(
            f"the student's nll of the labels is {found.student_nll:.2f} nats, and that of a unigram baseline "
            f"{found.counts_nll:.2f}"
        )
    uniform = log(found.vocab_size) - found.teacher_entropy
    if alpha and found.kl >= uniform:
        signs.append(
            f"KL to the teacher is {found.kl:.2f} nats, and that of a uniform distribution over all "
            f"{found.vocab_size:,} ids {uniform:.2f}"
        )
    if not alpha:
        return signs
    before, control = references.before, references.control
    if before and before.kl is not None and kl > (1 - CLOSER) * before.kl:
        signs.append(f"KL to the teacher was {before.kl:.2f} nats before training, and is {kl:.2f} after it")
    if control and control.kl is not None and kl >= control.kl and after.nll >= control.nll:
        signs.append(
            f"the control, which was trained on hard labels alone, has a KL of {control.kl:.2f} and an nll of "
            f"{control.nll:.2f} nats, the student {kl:.2f} and {after.nll:.2f}"
        )
    return signs


def _number(metrics: Any, name: str) -> float | None:
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return float(value)
