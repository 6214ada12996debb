"""Why a distillation is worse than it should be."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import DistillError
from ..models.model_types import model_type_of
from .agreement import Agreement, agreement_of
from .closeness import NO_REFERENCES, References
from .model_pair import ModelPair
from .tokenizer_check import TokenizerCheck, check_ids, roundtrip
from .trend import LINES, kl_trend_of, trend_of
from .verdicts import KL_INCREASED, OF_TEACHING, OF_TRAINING, DiagnosisInputs, Verdict, verdicts


@dataclass(frozen=True)
class Diagnosis:
    """What was measured of a pair, and what it means.

    agreement:     see `Agreement`
    tokenizer:     None: the pair has none
    verdicts:      failures by name; none of a smoke run
    not_looked_at: what could not be judged, and why
    conclusion:    what was found, or that the run could not be judged because checks were skipped; of a smoke run that
                   it is one
    references:    the student before training, and the control; None: not given
    smoke:         of a smoke run, a sentence that says so; None: it is none
    """

    agreement: Agreement
    tokenizer: TokenizerCheck | None
    verdicts: list[Verdict]
    not_looked_at: list[str]
    conclusion: str
    references: References | None
    smoke: str | None = None


def diagnose(
    pair: ModelPair,
    tokens: int | None = 4096,
    logs: Sequence[Mapping[str, Any]] = (),
    references: References | None = None,
) -> Diagnosis:
    """Compare student and teacher over held-out tokens, in one forward of each, and name what went wrong.

    Args:
        pair: see `ModelPair.of_run`; its objective is the one that the student was trained with, alpha 0 if none was.
        tokens: until so many were asked; None: all.
        logs: lines of the training's log (`run.logs()`); without them nothing is said of its course.
        references: the student before training, and the control (`References.of_evidence`); without them the student
            is compared with a unigram baseline and a uniform distribution alone.

    Raises:
        DistillError: the slice is empty, a model is missing or broken, or the rows have ids that it lacks.
    """
    if pair.teacher is None or pair.student is None:
        lacks = "teacher" if pair.teacher is None else "student"
        raise DistillError(f"There is no {lacks} to diagnose: a pair of both is compared.")
    check_ids(pair)
    facts = DiagnosisInputs(
        agreement_of(pair, tokens),
        pair.temperature,
        pair.alpha,
        trend_of(logs),
        roundtrip(pair),
        references or NO_REFERENCES,
        kl_trend_of(logs),
    )
    shift = model_type_of(pair.student).shifts_labels
    found = verdicts(facts) if pair.smoke is None else []
    names = [one.name for one in found]
    skipped = [*_unknown(facts, {*names}, shift)]
    if references is not None and facts.alpha and (references.before is None or references.before.kl is None):
        skipped.append("far_from_teacher, against the student before training: no KL of it was measured")
    conclusion = _conclusion(names, skipped)
    if pair.smoke is not None:
        conclusion = f"{pair.smoke} Its figures mean nothing, so its quality is not judged."
    return Diagnosis(facts.agreement, facts.tokenizer, found, skipped, conclusion, references, pair.smoke)


def _unknown(facts: DiagnosisInputs, named: set[str], shift: bool) -> Iterator[str]:
    if not facts.alpha:
        yield f"{', '.join(OF_TEACHING)}: alpha is 0, so the student heard no teacher"
    if facts.trend is None:
        kl = [KL_INCREASED] if facts.alpha and facts.kl_trend is None else []
        names = ", ".join([*OF_TRAINING, *kl])
        yield f"{names}: fewer than {LINES} lines of the training's log; lower train.logging_steps"
    elif not (named & {*OF_TRAINING} or facts.trend.at_end.falls or facts.trend.at_end.flat):
        yield f"{', '.join(OF_TRAINING)}: the loss is too noisy to tell whether it still fell; log more steps a line"
    if not shift:
        yield "a wrong shift: this kind of model predicts in place"
    elif len(facts.agreement.kl_at) < 2:
        yield "a wrong shift: no two tokens that stand side by side are asked"


def _conclusion(names: Sequence[str], skipped: Sequence[str]) -> str:
    """One sentence on the whole run.

    Args:
        names: of the verdicts.
        skipped: checks that could not be made, and why.
    """
    if names:
        return f"{len(names)} failure{'s' if len(names) > 1 else ''} found: {', '.join(names)}."
    if skipped:
        return "The run could not be judged: the checks that were made found nothing wrong, and others were skipped."
    return "Nothing was found to be wrong."
