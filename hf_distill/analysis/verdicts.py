"""Named failure modes of a distillation: pure functions from measurements to verdicts with advice."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

from .agreement import Agreement
from .closeness import CLOSE_KL_NATS, NO_REFERENCES, References, signs_of_distance
from .tokenizer_check import TokenizerCheck
from .trend import KlTrend, Trend

# A neighboring position fits better if its NLL or KL is below this share of the aligned one; in a healthy pair it is
# far above 1.
MAX_NEIGHBOR_RATIO = 0.75
MAX_PADDING_SHARE = 0.01  # of the target tokens; the correct share is 0
# Share of labels that the unigram baseline predicts better than the teacher: nearly all if the ids are wrong, fewer if
# the teacher is confident and wrong.
MAX_BELOW_UNIGRAM_SHARE = 0.7
MAX_UNKNOWN_SHARE = 0.05  # of the ids; a tokenizer made for the text's language produces hardly any unknown tokens
TEACHER_NLL_MARGIN_NATS = 0.05  # nats/token by which the teacher's NLL may exceed the student's
# Teacher entropy as a share of log V, and share of the soft gradient's squared norm in the teacher's tail. Beyond both,
# noise dominates the gradient.
MAX_ENTROPY_SHARE, MAX_TAIL_GRADIENT_SHARE = 0.9, 0.5
MIN_ENTROPY_NATS = 0.15  # below, the likeliest id has more than 97 % of the mass
MIN_SOFT_GRADIENT_SHARE = 0.03  # of the whole gradient; below, the soft term has no effect
# Of all tokens, beyond what the teacher's probabilities predict; of the teacher's errors; of the whole gradient.
MAX_EXCESS_ERROR_SHARE, MAX_COPIED_ERROR_SHARE, MAX_SOFT_GRADIENT_SHARE = 0.05, 0.5, 0.8
CAPACITY_GAP_KL_NATS, CAPACITY_GAP_NLL_NATS = 0.3, 0.15  # nats/token: KL to the teacher; NLL above the teacher's
MIN_TEACHER_TAIL_MASS, MIN_TAIL_RATIO = 0.01, 0.35  # mass of the teacher's tail; student's tail mass / teacher's
MIN_ENTROPY_RATIO = 0.5  # student's entropy / teacher's

# Verdicts that require alpha > 0, and verdicts that require a training log.
TEACHER_VERDICTS = ("temperature_too_high", "temperature_too_low", "alpha_too_high", "alpha_too_low", "capacity_gap")
TRAINING_VERDICTS = ("under_trained", "capacity_gap")
KL_INCREASED = "kl_increased"


@dataclass(frozen=True)
class Verdict:
    """A failure mode: its name, the measurements that show it, and advice."""

    name: str
    text: str
    advice: str


@dataclass(frozen=True)
class DiagnosisInputs:
    """The measurements and settings that verdicts are derived from.

    agreement:   measurements of teacher and student
    temperature, alpha: of the objective
    trend:       of the training loss; None if unknown, then no verdict on the training is made
    tokenizer:   round trip through the tokenizer; None if unknown
    references:  metrics of the initial student and of the control
    kl_trend:    of the KL to the teacher during training; None if unknown
    """

    agreement: Agreement
    temperature: float
    alpha: float
    trend: Trend | None = None
    tokenizer: TokenizerCheck | None = None
    references: References = NO_REFERENCES
    kl_trend: KlTrend | None = None


def verdicts(inputs: DiagnosisInputs) -> list[Verdict]:
    """Return all failure modes, causes first.

    A failure that another one explains is left out, because its advice would be misleading.
    """
    for find_cause in (wrong_shift_or_mask, wrong_tokenizer):
        if verdict := find_cause(inputs):
            return [verdict]  # no other measurement is meaningful
    results: list[Verdict] = []
    explained: set[str] = set()
    for check, explains in _EXPLAINS.items():
        if check.__name__ not in explained and (verdict := check(inputs)):
            results.append(verdict)
            explained.update(explains)
    return results


def wrong_shift_or_mask(inputs: DiagnosisInputs) -> Verdict | None:
    """A neighboring position fits better, or padding tokens are target tokens."""
    agreement, reasons = inputs.agreement, []
    for offset, nll in agreement.label_at.items():
        if nll < MAX_NEIGHBOR_RATIO * agreement.label_at[0]:
            reasons.append(
                f"the teacher predicts the label at offset {offset:+d} better than the label at offset 0 "
                f"({nll:.2f} nats instead of {agreement.label_at[0]:.2f})"
            )
    for offset, kl in agreement.kl_at.items():
        if agreement.kl_at[0] > CLOSE_KL_NATS and kl < MAX_NEIGHBOR_RATIO * agreement.kl_at[0]:
            reasons.append(
                f"the KL with the teacher shifted by {offset:+d} position is lower than the KL at the same position "
                f"({kl:.2f} nats instead of {agreement.kl_at[0]:.2f})"
            )
    if agreement.padding > MAX_PADDING_SHARE:
        reasons.append(f"{agreement.padding:.0%} of the target tokens are padding")
    if not reasons:
        return None
    return Verdict(
        "wrong_shift_or_mask",
        _sentence(reasons),
        "Each label must be at the same position as its input id, because the trainer shifts the labels once: do not "
        "shift them in the data. Give padding and prompts the label -100. `hf-distill recipes preview` shows which "
        "tokens are target tokens.",
    )


def wrong_tokenizer(inputs: DiagnosisInputs) -> Verdict | None:
    """The teacher predicts the labels worse than the unigram baseline, or the ids are not the tokenizer's."""
    agreement, tokenizer, reasons = inputs.agreement, inputs.tokenizer, []
    if agreement.teacher_nll > agreement.counts_nll and agreement.below_counts > MAX_BELOW_UNIGRAM_SHARE:
        reasons.append(
            f"the teacher's NLL of the labels is {agreement.teacher_nll:.2f} nats; the unigram baseline's NLL is "
            f"{agreement.counts_nll:.2f}, and it is better for {agreement.below_counts:.0%} of the labels"
        )
    if tokenizer and tokenizer.outside:
        reasons.append(f"{tokenizer.outside} ids of the first {tokenizer.rows} rows are not in the tokenizer")
    if tokenizer and tokenizer.unknown > MAX_UNKNOWN_SHARE:
        reasons.append(f"{tokenizer.unknown:.0%} of the ids are the tokenizer's unknown token")
    if not reasons:
        return None
    return Verdict(
        "wrong_tokenizer",
        _sentence(reasons),
        "The ids of the data do not have the same meaning for the teacher: tokenize the data with the teacher's "
        "tokenizer, and check that the teacher's weights were loaded completely (no missing keys).",
    )


def teacher_weaker_than_labels(inputs: DiagnosisInputs) -> Verdict | None:
    """The student predicts the labels better than its teacher."""
    agreement = inputs.agreement
    if agreement.teacher_nll < agreement.student_nll + TEACHER_NLL_MARGIN_NATS:
        return None
    return Verdict(
        "teacher_weaker_than_labels",
        f"The teacher's NLL of the labels is {agreement.teacher_nll:.2f} nats, the student's is "
        f"{agreement.student_nll:.2f}; for {agreement.teacher_worse:.0%} of the tokens the teacher gives the label a "
        "lower probability than the student.",
        "Train the teacher on this data first, use another teacher, or lower distill.alpha: on this data the labels "
        "are the better signal. If the student only has to be close to its teacher, compare its KL with that of the "
        "control instead.",
    )


def temperature_too_high(inputs: DiagnosisInputs) -> Verdict | None:
    """At T the teacher is nearly uniform, and ids that it considers unlikely dominate the soft gradient."""
    agreement, max_entropy = inputs.agreement, log(inputs.agreement.vocab_size)
    if not inputs.alpha or inputs.temperature <= 1:
        return None
    if agreement.soft_entropy < MAX_ENTROPY_SHARE * max_entropy or agreement.soft_tail < MAX_TAIL_GRADIENT_SHARE:
        return None
    return Verdict(
        "temperature_too_high",
        f"At T = {inputs.temperature:g} the teacher's entropy is {agreement.soft_entropy:.2f} of at most "
        f"{max_entropy:.2f} nats (at T = 1: {agreement.teacher_entropy:.2f}), and {agreement.soft_tail:.0%} of the "
        "soft gradient (squared norm) is on ids that the teacher considers unlikely.",
        "Lower distill.temperature; `hf-distill temperature` searches for the best value.",
    )


def temperature_too_low(inputs: DiagnosisInputs) -> Verdict | None:
    """At T the teacher is nearly one-hot."""
    if not inputs.alpha or inputs.agreement.soft_entropy > MIN_ENTROPY_NATS:
        return None
    return Verdict(
        "temperature_too_low",
        f"At T = {inputs.temperature:g} the teacher's entropy is {inputs.agreement.soft_entropy:.3f} nats: its soft "
        "labels carry little more information than hard labels.",
        "Raise distill.temperature; `hf-distill temperature` searches for the best value.",
    )


def alpha_too_high(inputs: DiagnosisInputs) -> Verdict | None:
    """The student copies errors of the teacher that the labels could have corrected."""
    agreement, soft_share = inputs.agreement, inputs.agreement.gradient.get("soft", 0.0)
    if agreement.excess_errors < MAX_EXCESS_ERROR_SHARE or agreement.copied_errors < MAX_COPIED_ERROR_SHARE:
        return None
    if soft_share < MAX_SOFT_GRADIENT_SHARE:
        return None
    return Verdict(
        "alpha_too_high",
        f"For {agreement.confident_teacher_errors:.0%} of the tokens the teacher is confident of an id other than the "
        f"label ({agreement.excess_errors:.0%} more than its own probabilities predict), and the student has the same "
        f"top-1 id for {agreement.copied_errors:.0%} of these; {soft_share:.0%} of the gradient comes from the soft "
        "term.",
        "Lower distill.alpha, so that the labels outweigh the teacher where it is wrong.",
    )


def alpha_too_low(inputs: DiagnosisInputs) -> Verdict | None:
    """The soft term has no effect on the student."""
    soft_share = inputs.agreement.gradient.get("soft", 0.0)
    if not inputs.alpha or soft_share > MIN_SOFT_GRADIENT_SHARE or inputs.agreement.kl < CLOSE_KL_NATS:
        return None
    return Verdict(
        "alpha_too_low",
        f"{soft_share:.1%} of the gradient comes from the soft term, and the KL to the teacher is "
        f"{inputs.agreement.kl:.2f} nats.",
        "Raise distill.alpha: at the present value this is training on hard labels.",
    )


def kl_increased(inputs: DiagnosisInputs) -> Verdict | None:
    """The student was closer to its teacher earlier in training than at the end."""
    trend = inputs.kl_trend
    if trend is None or not inputs.alpha or not trend.rises or trend.last <= CLOSE_KL_NATS:
        return None
    return Verdict(
        KL_INCREASED,
        f"The KL to the teacher was {trend.lowest:.2f} nats at step {trend.step}, and is {trend.last:.2f} at the end.",
        "Set train.early_stopping_patience and train.metric_for_best_model=kl, which exports the best checkpoint; lower"
        " train.learning_rate, or raise distill.alpha if the hard labels lead away from the teacher.",
    )


def under_trained(inputs: DiagnosisInputs) -> Verdict | None:
    """The loss was still falling at the end, or at a high learning rate while the student is far from its teacher."""
    if inputs.trend is None:
        return None
    end, high = inputs.trend.at_end, inputs.trend.while_high
    if end.falls:
        text = f"The loss fell by {end.share:.1%} from the third to the last quarter of the steps."
    elif high.falls and _is_far(inputs.agreement):
        text = (
            f"The loss was still falling by {high.share:.1%} in the last third of the steps at a high learning rate, "
            f"before the schedule lowered it, and the KL to the teacher is {inputs.agreement.kl:.2f} nats."
        )
    else:
        return None
    return Verdict(
        "under_trained",
        text,
        "Raise train.max_steps or train.learning_rate; `hf-distill curve` shows how quality grows with tokens.",
    )


def capacity_gap(inputs: DiagnosisInputs) -> Verdict | None:
    """The loss is flat even at a high learning rate, and the student is far from its teacher."""
    agreement, trend = inputs.agreement, inputs.trend
    if trend is None or not inputs.alpha or not (trend.at_end.flat and trend.while_high.flat and _is_far(agreement)):
        return None
    return Verdict(
        "capacity_gap",
        f"The loss stopped falling before the learning rate did; the KL to the teacher is {agreement.kl:.2f} nats, "
        f"and the student's NLL of the labels is {agreement.student_nll - agreement.teacher_nll:.2f} nats above the "
        "teacher's.",
        "Use a larger student, or distill through intermediate students (`stages`, see the recipe progressive).",
    )


def far_from_teacher(inputs: DiagnosisInputs) -> Verdict | None:
    """The student is no better than a baseline, than before training, or than the control."""
    signs = signs_of_distance(inputs.agreement, inputs.references, inputs.alpha)
    if not signs:
        return None
    return Verdict(
        "far_from_teacher",
        _sentence(signs),
        "Look at the loss in metrics.jsonl: where it rose, lower train.learning_rate; where it hardly fell, raise "
        "train.max_steps or train.learning_rate. `hf-distill recipes preview` shows what the student is trained on.",
    )


def collapsed_tail(inputs: DiagnosisInputs) -> Verdict | None:
    """The student's distribution is far sharper than its teacher's."""
    agreement = inputs.agreement
    has_tail = agreement.teacher_tail > MIN_TEACHER_TAIL_MASS
    lost_tail = has_tail and agreement.student_tail < MIN_TAIL_RATIO * agreement.teacher_tail
    if not lost_tail and agreement.student_entropy > MIN_ENTROPY_RATIO * agreement.teacher_entropy:
        return None
    return Verdict(
        "collapsed_tail",
        f"The student's entropy is {agreement.student_entropy:.2f} nats, the teacher's is "
        f"{agreement.teacher_entropy:.2f}; outside the teacher's likeliest ids the student has "
        f"{agreement.student_tail:.1%} of its mass, the teacher {agreement.teacher_tail:.1%}.",
        "Use distill.divergence forward_kl (or js) instead of reverse_kl, a sampled or hidden cache instead of a top_k "
        "cache, and a lower learning rate.",
    )


def _is_far(agreement: Agreement) -> bool:
    nll_gap = agreement.student_nll - agreement.teacher_nll
    return agreement.kl > CAPACITY_GAP_KL_NATS and nll_gap > CAPACITY_GAP_NLL_NATS


def _sentence(phrases: list[str]) -> str:
    """Join phrases to one sentence."""
    text = "; ".join(phrases)
    return text[0].upper() + text[1:] + "."


# Checks in this order, each with the names of the verdicts that it explains.
_EXPLAINS: dict[Callable[[DiagnosisInputs], Verdict | None], tuple[str, ...]] = {
    # A weak teacher is flat as well, and a large KL to it is no failure.
    teacher_weaker_than_labels: ("temperature_too_high", "alpha_too_low", KL_INCREASED, "far_from_teacher"),
    temperature_too_high: (
        "alpha_too_low",
        KL_INCREASED,
        "far_from_teacher",
    ),  # the soft gradient is small because of T
    temperature_too_low: ("alpha_too_low",),
    alpha_too_high: (),
    alpha_too_low: (KL_INCREASED, "far_from_teacher"),
    kl_increased: ("under_trained", "capacity_gap"),  # more steps would increase the KL further
    collapsed_tail: ("capacity_gap",),  # the KL is large because the student is too sharp
    under_trained: ("capacity_gap", "far_from_teacher"),
    far_from_teacher: ("capacity_gap",),  # a student that is worse than a baseline has not used its capacity
    capacity_gap: (),
}
