"""Whether a student is close to its teacher, compared with baselines, the initial student and the control."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, log

from .agreement import Agreement

CLOSE_KL_NATS = 0.1  # nats/token; a student with a lower KL to its teacher counts as close
MIN_KL_REDUCTION_SHARE = 0.1  # share of the initial KL by which training must have lowered it


@dataclass(frozen=True)
class HeldOut:
    """A model's metrics on the held-out rows.

    nll: of the labels, nats/token
    kl:  KL(teacher || model) at T = 1, nats/token; None if it was not measured
    """

    nll: float
    kl: float | None

    @classmethod
    def of(cls, metrics: object) -> "HeldOut | None":
        """Read one model's metrics from results.json; None if they contain no perplexity."""
        perplexity = _finite_number(metrics, "perplexity")
        if perplexity is None or perplexity <= 0:
            return None
        return cls(log(perplexity), _finite_number(metrics, "kl"))


@dataclass(frozen=True)
class References:
    """Measurements on all held-out rows of a run; None where there are none.

    before:  the student before training
    control: the same student, trained on hard labels only
    after:   the diagnosed student; None: the measurements of the diagnosis are used instead
    """

    before: HeldOut | None = None
    control: HeldOut | None = None
    after: HeldOut | None = None

    @classmethod
    def of_evidence(cls, evidence: object, name: str) -> "References":
        """Read the references from results.json.

        Args:
            evidence: content of results.json; measurements that are missing become None.
            name: the diagnosed model: "student", "control", or any other name.
        """
        models = evidence.get("models") if isinstance(evidence, Mapping) else None
        models = models if isinstance(models, Mapping) else {}
        metrics = {key: HeldOut.of(models.get(key)) for key in ("before", "student", "control")}
        control = None if name == "control" else metrics["control"]
        return cls(metrics["before"], control, metrics.get(name))


NO_REFERENCES = References()


def signs_of_distance(agreement: Agreement, references: References, alpha: float) -> list[str]:
    """Return one phrase for each comparison that shows that a student is not close to its teacher.

    The unigram baseline predicts each token with its frequency; the uniform distribution gives all ids the same
    probability.

    Args:
        agreement: measurements of teacher and student.
        references: metrics of the initial student and of the control.
        alpha: of the objective; with 0 only the labels count.
    """
    after = references.after or HeldOut(agreement.student_nll, agreement.kl)
    kl = agreement.kl if after.kl is None else after.kl
    if alpha and kl <= CLOSE_KL_NATS:
        return []
    signs = []
    if agreement.student_nll >= agreement.counts_nll:
        signs.append(
            f"the student's NLL of the labels is {agreement.student_nll:.2f} nats, and the unigram baseline's is "
            f"{agreement.counts_nll:.2f}"
        )
    uniform_kl = log(agreement.vocab_size) - agreement.teacher_entropy
    if alpha and agreement.kl >= uniform_kl:
        signs.append(
            f"the KL to the teacher is {agreement.kl:.2f} nats, and that of a uniform distribution over all "
            f"{agreement.vocab_size:,} ids is {uniform_kl:.2f}"
        )
    if not alpha:
        return signs
    before, control = references.before, references.control
    if before and before.kl is not None and kl > (1 - MIN_KL_REDUCTION_SHARE) * before.kl:
        signs.append(f"the KL to the teacher was {before.kl:.2f} nats before training, and is {kl:.2f} after it")
    if control and control.kl is not None and kl >= control.kl and after.nll >= control.nll:
        signs.append(
            f"the control, which was trained on hard labels only, has a KL of {control.kl:.2f} and an NLL of "
            f"{control.nll:.2f} nats, the student {kl:.2f} and {after.nll:.2f}"
        )
    return signs


def _finite_number(metrics: object, name: str) -> float | None:
    value = metrics.get(name) if isinstance(metrics, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value):
        return None
    return float(value)
