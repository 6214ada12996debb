"""Diagnosis of a distillation: measurements of teacher and student, and the failure modes that they show."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..core.defaults import HELD_OUT_TOKENS
from ..errors import DistillError
from ..models.model_types import model_type_of
from .agreement import Agreement, agreement_of
from .closeness import NO_REFERENCES, References
from .model_pair import ModelPair
from .tokenizer_check import TokenizerCheck, check_ids, roundtrip
from .trend import MIN_LOG_LINES, kl_trend_of, trend_of
from .verdicts import KL_INCREASED, TEACHER_VERDICTS, TRAINING_VERDICTS, DiagnosisInputs, Verdict, verdicts


@dataclass(frozen=True)
class Diagnosis:
    """Measurements of teacher and student, and the verdicts derived from them.

    agreement:     see `Agreement`
    tokenizer:     None if the pair has no tokenizer
    verdicts:      failure modes by name; empty for a smoke run
    not_looked_at: checks that could not be made, each with the reason
    conclusion:    the failures, or that none was found, or that the run cannot be judged because checks were skipped;
                   for a smoke run, that it is one
    references:    metrics of the initial student and of the control; None if not given
    smoke:         for a smoke run, a sentence that states it; else None
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
    tokens: int | None = HELD_OUT_TOKENS,
    logs: Sequence[Mapping[str, float]] = (),
    references: References | None = None,
) -> Diagnosis:
    """Compare student and teacher over held-out tokens, with one forward pass of each, and name failure modes.

    Args:
        pair: see `ModelPair.of_run`; its objective is the one that the student was trained with, with alpha 0 for a
            student that was trained without a teacher.
        tokens: number of target tokens after which no further batch is read; None reads all rows.
        logs: lines of the training log (`run.logs()`); without them no verdict on the training is made.
        references: metrics of the initial student and of the control (`References.of_evidence`); without them the
            student is compared only with the unigram baseline and a uniform distribution.

    Returns:
        the measurements, and a verdict on each failure mode with advice.

    Raises:
        DistillError: the held-out rows have no target token, a model is missing or has NaN logits, or the rows have ids
            that a model lacks.
    """
    if pair.teacher is None or pair.student is None:
        missing = "teacher" if pair.teacher is None else "student"
        raise DistillError(f"There is no {missing} to diagnose: a diagnosis compares a teacher and a student.")
    check_ids(pair)
    inputs = DiagnosisInputs(
        agreement_of(pair, tokens),
        pair.temperature,
        pair.alpha,
        trend_of(logs),
        roundtrip(pair),
        references or NO_REFERENCES,
        kl_trend_of(logs),
    )
    shift = model_type_of(pair.student).shifts_labels
    failures = verdicts(inputs) if pair.smoke is None else []
    names = [verdict.name for verdict in failures]
    skipped = [*_skipped_checks(inputs, {*names}, shift)]
    if references is not None and inputs.alpha and (references.before is None or references.before.kl is None):
        skipped.append("far_from_teacher, compared with the initial student: its KL was not measured")
    conclusion = _conclusion(names, skipped)
    if pair.smoke is not None:
        conclusion = f"{pair.smoke} Its metrics are not meaningful, so its quality is not judged."
    return Diagnosis(inputs.agreement, inputs.tokenizer, failures, skipped, conclusion, references, pair.smoke)


def _skipped_checks(inputs: DiagnosisInputs, failures: set[str], shift: bool) -> Iterator[str]:
    """Name the checks that could not be made, each with the reason."""
    if not inputs.alpha:
        yield f"{', '.join(TEACHER_VERDICTS)}: alpha is 0, so the student was trained without the teacher's logits"
    if inputs.trend is None:
        kl = [KL_INCREASED] if inputs.alpha and inputs.kl_trend is None else []
        names = ", ".join([*TRAINING_VERDICTS, *kl])
        yield f"{names}: the training log has fewer than {MIN_LOG_LINES} lines; lower train.logging_steps"
    elif not (failures & {*TRAINING_VERDICTS} or inputs.trend.at_end.falls or inputs.trend.at_end.flat):
        names = ", ".join(TRAINING_VERDICTS)
        yield (
            f"{names}: the loss is too noisy to decide whether it was still falling; a run with more steps, or with "
            "twice the train.logging_steps, can tell"
        )
    if not shift:
        yield "a wrong shift: this type of model predicts each label at its own position"
    elif len(inputs.agreement.kl_at) < 2:
        yield "a wrong shift: no two target tokens are adjacent"


def _conclusion(failures: Sequence[str], skipped: Sequence[str]) -> str:
    """Return one sentence on the whole run.

    Args:
        failures: names of the verdicts.
        skipped: checks that could not be made, each with the reason.
    """
    if failures:
        return f"{len(failures)} failure{'s' if len(failures) > 1 else ''} found: {', '.join(failures)}."
    if skipped:
        return "The run could not be judged: the checks that were made found no failure, and other checks were skipped."
    return "No failure was found."
