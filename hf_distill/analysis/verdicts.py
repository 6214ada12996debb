"""Named failures of a distillation: from what was measured to a verdict with its advice. Pure functions."""

from collections.abc import Callable
from dataclasses import dataclass
from math import log

from .agreement import Agreement
from .closeness import APART, NO_REFERENCES, References, signs_of_distance
from .tokenizer_check import TokenizerCheck
from .trend import KlTrend, Trend

SHIFT = 0.75  # of the nats at its own place: another offset fits better below; a healthy pair is far above 1 there
PADDING = 0.01  # share of asked padding: none is right
# Share of labels that counting tells better: nearly all with wrong ids, fewer if a teacher is sure and wrong.
LOST = 0.7
UNKNOWN = 0.05  # share of unknown tokens: a tokenizer of the text's language has hardly any
WEAKER = 0.05  # nats/token by which a teacher may lose to its student before it teaches nothing
# Entropy, of log V, and share of the soft gradient in the teacher's tail: beyond both, noise leads.
FLAT, DROWNED = 0.9, 0.5
HARD = 0.15  # nats: below, the likeliest id has more than 97 % of the mass
IGNORED = 0.03  # share of the soft term's gradient below which it steers nothing
MISTAKES, COPIED, LED = 0.05, 0.5, 0.8  # of tokens, beyond what the teacher admits; of these; of the gradient
GAP_KL, GAP_NLL = 0.3, 0.15  # nats/token from the teacher, and behind it on the labels: far
TAIL, TAIL_LEFT = 0.01, 0.35  # mass of the teacher's tail; share of it that the student has left
SHARPER = 0.5  # of the teacher's entropy

OF_TEACHING = ("temperature_too_high", "temperature_too_low", "alpha_too_high", "alpha_too_low", "capacity_gap")
OF_TRAINING = ("under_trained", "capacity_gap")
KL_INCREASED = "kl_increased"


@dataclass(frozen=True)
class Verdict:
    """A failure: its name, what was seen, what to do."""

    name: str
    text: str
    advice: str


@dataclass(frozen=True)
class DiagnosisInputs:
    """What verdicts are made from.

    agreement:   of the pair
    temperature, alpha: of the objective
    trend:       of the training's loss; None: unknown, and nothing is said of its course
    tokenizer:   None: unknown
    references:  the student before training, and the control
    kl_trend:    of the KL to the teacher during training; None: unknown
    """

    agreement: Agreement
    temperature: float
    alpha: float
    trend: Trend | None = None
    tokenizer: TokenizerCheck | None = None
    references: References = NO_REFERENCES
    kl_trend: KlTrend | None = None


def verdicts(facts: DiagnosisInputs) -> list[Verdict]:
    """What went wrong, causes first; what a cause explains is not named beside it, for its advice would mislead."""
    for cause in (wrong_shift_or_mask, wrong_tokenizer):
        if verdict := cause(facts):
            return [verdict]  # nothing else means anything
    found: list[Verdict] = []
    explained: set[str] = set()
    for one, explains in _EXPLAINS.items():
        if one.__name__ not in explained and (verdict := one(facts)):
            found.append(verdict)
            explained.update(explains)
    return found


def wrong_shift_or_mask(facts: DiagnosisInputs) -> Verdict | None:
    """Another offset fits better, or padding is asked."""
    found, seen = facts.agreement, []
    for offset, nll in found.label_at.items():
        if nll < SHIFT * found.label_at[0]:
            seen.append(
                f"the teacher predicts the label at offset {offset:+d} better ({nll:.2f} nats, "
                f"{found.label_at[0]:.2f} for its own)"
            )
    for offset, kl in found.kl_at.items():
        if found.kl_at[0] > APART and kl < SHIFT * found.kl_at[0]:
            seen.append(
                f"the student is closer to the teacher's token at offset {offset:+d} ({kl:.2f} nats, "
                f"{found.kl_at[0]:.2f} to its own)"
            )
    if found.padding > PADDING:
        seen.append(f"{found.padding:.0%} of the asked tokens are padding")
    if not seen:
        return None
    text = "; ".join(seen)
    return Verdict(
        "wrong_shift_or_mask",
        text[0].upper() + text[1:] + ".",
        "Labels stand at the same position as their input ids, and the trainer shifts them once: do not shift them in "
        "the data. Padding and prompts have the label -100. `hf-distill recipes preview` shows what is asked.",
    )


def wrong_tokenizer(facts: DiagnosisInputs) -> Verdict | None:
    """The teacher knows less of the labels than one who counted them, or the ids are not its tokenizer's."""
    found, tokenizer, seen = facts.agreement, facts.tokenizer, []
    if found.teacher_nll > found.counts_nll and found.below_counts > LOST:
        seen.append(
            f"the teacher's nll of the labels is {found.teacher_nll:.2f} nats; who only knows how often each occurs "
            f"has {found.counts_nll:.2f}, and does better for {found.below_counts:.0%} of them"
        )
    if tokenizer and tokenizer.outside:
        seen.append(f"the tokenizer does not have {tokenizer.outside} ids of the first {tokenizer.rows} rows")
    if tokenizer and tokenizer.unknown > UNKNOWN:
        seen.append(f"{tokenizer.unknown:.0%} of the ids stand for what the tokenizer does not know")
    if not seen:
        return None
    text = "; ".join(seen)
    return Verdict(
        "wrong_tokenizer",
        text[0].upper() + text[1:] + ".",
        "The ids do not mean to the teacher what they mean to the data: tokenise with the teacher's own tokenizer, and "
        "check that its weights were loaded (missing keys).",
    )


def teacher_weaker_than_labels(facts: DiagnosisInputs) -> Verdict | None:
    """The student knows the labels better than its teacher."""
    found = facts.agreement
    if found.teacher_nll < found.student_nll + WEAKER:
        return None
    return Verdict(
        "teacher_weaker_than_labels",
        f"The teacher's nll of the labels is {found.teacher_nll:.2f} nats, the student's {found.student_nll:.2f}; the "
        f"teacher gives the label less than the student for {found.teacher_worse:.0%} of the tokens.",
        "Train the teacher on this data first, take another one, or lower distill.alpha: here the labels teach more.",
    )


def temperature_too_high(facts: DiagnosisInputs) -> Verdict | None:
    """At T the teacher is nearly uniform, and most of the soft gradient is about ids that it thinks unlikely."""
    found, most = facts.agreement, log(facts.agreement.vocab_size)
    if not facts.alpha or facts.temperature <= 1 or found.soft_entropy < FLAT * most or found.soft_tail < DROWNED:
        return None
    return Verdict(
        "temperature_too_high",
        f"At T = {facts.temperature:g} the teacher's entropy is {found.soft_entropy:.2f} of at most {most:.2f} nats "
        f"(T = 1: {found.teacher_entropy:.2f}), and {found.soft_tail:.0%} of the soft gradient (squared norm) is about "
        "ids that it thinks unlikely.",
        "Lower distill.temperature; `hf-distill temperature` finds the one that serves.",
    )


def temperature_too_low(facts: DiagnosisInputs) -> Verdict | None:
    """At T the teacher is nearly one-hot."""
    if not facts.alpha or facts.agreement.soft_entropy > HARD:
        return None
    return Verdict(
        "temperature_too_low",
        f"At T = {facts.temperature:g} the teacher's entropy is {facts.agreement.soft_entropy:.3f} nats: its soft "
        "labels say little more than hard ones.",
        "Raise distill.temperature; `hf-distill temperature` finds the one that serves.",
    )


def alpha_too_high(facts: DiagnosisInputs) -> Verdict | None:
    """The student copies mistakes of which the labels could have told it."""
    found, led = facts.agreement, facts.agreement.gradient.get("soft", 0.0)
    if found.excess_errors < MISTAKES or found.copied_errors < COPIED or led < LED:
        return None
    return Verdict(
        "alpha_too_high",
        f"For {found.confident_teacher_errors:.0%} of the tokens the teacher is sure of another id than the label "
        f"({found.excess_errors:.0%} more than it admits), and the student says the same for {found.copied_errors:.0%} "
        f"of them; {led:.0%} of the gradient is the soft term's.",
        "Lower distill.alpha, so that the labels outweigh the teacher where it is wrong.",
    )


def alpha_too_low(facts: DiagnosisInputs) -> Verdict | None:
    """The soft term steers nothing."""
    led = facts.agreement.gradient.get("soft", 0.0)
    if not facts.alpha or led > IGNORED or facts.agreement.kl < APART:
        return None
    return Verdict(
        "alpha_too_low",
        f"{led:.1%} of the gradient is the soft term's, and KL to the teacher is {facts.agreement.kl:.2f} nats.",
        "Raise distill.alpha: as it is, this is training on hard labels.",
    )


def kl_increased(facts: DiagnosisInputs) -> Verdict | None:
    """The student was closer to its teacher earlier in training than at the end."""
    trend = facts.kl_trend
    if trend is None or not facts.alpha or not trend.rises or trend.last <= APART:
        return None
    return Verdict(
        KL_INCREASED,
        f"KL to the teacher was {trend.lowest:.2f} nats at step {trend.step}, and is {trend.last:.2f} at the end.",
        "Set train.early_stopping_patience and train.metric_for_best_model=kl, which exports the best checkpoint; lower"
        " train.learning_rate, or raise distill.alpha where the hard labels lead away from the teacher.",
    )


def under_trained(facts: DiagnosisInputs) -> Verdict | None:
    """The loss still fell at the end, or, of a student that is still far, when the learning rate was brought down."""
    if facts.trend is None:
        return None
    end, high = facts.trend.at_end, facts.trend.while_high
    if end.falls:
        seen = f"The loss fell by {end.share:.1%} from the third to the last quarter of the steps."
    elif high.falls and _far(facts.agreement):
        seen = (
            f"The loss still fell by {high.share:.1%} in the last third of the steps at a high learning rate, before "
            f"the schedule ended it, and the student is {facts.agreement.kl:.2f} nats from its teacher."
        )
    else:
        return None
    return Verdict(
        "under_trained",
        seen,
        "Raise train.max_steps, or train.learning_rate; `hf-distill curve` shows what more tokens would bring.",
    )


def capacity_gap(facts: DiagnosisInputs) -> Verdict | None:
    """The loss fell no more, even at a high learning rate, and the student is far from its teacher."""
    found, trend = facts.agreement, facts.trend
    if trend is None or not facts.alpha or not (trend.at_end.flat and trend.while_high.flat and _far(found)):
        return None
    return Verdict(
        "capacity_gap",
        f"The loss had stopped falling before the learning rate did, and the student is {found.kl:.2f} nats from its "
        f"teacher, {found.student_nll - found.teacher_nll:.2f} behind it on the labels.",
        "Take a larger student, or go through students in between (`stages`, see the recipe progressive).",
    )


def far_from_teacher(facts: DiagnosisInputs) -> Verdict | None:
    """The student is no better than a baseline, the student before training, or the control."""
    signs = signs_of_distance(facts.agreement, facts.references, facts.alpha)
    if not signs:
        return None
    text = "; ".join(signs)
    return Verdict(
        "far_from_teacher",
        text[0].upper() + text[1:] + ".",
        "Look at the loss in metrics.jsonl: where it rose, lower train.learning_rate; where it hardly fell, raise "
        "train.max_steps or train.learning_rate. `hf-distill recipes preview` shows what the student is trained on.",
    )


def collapsed_tail(facts: DiagnosisInputs) -> Verdict | None:
    """The student is far surer than its teacher."""
    found = facts.agreement
    tail = found.teacher_tail > TAIL and found.student_tail < TAIL_LEFT * found.teacher_tail
    if not tail and found.student_entropy > SHARPER * found.teacher_entropy:
        return None
    return Verdict(
        "collapsed_tail",
        f"The student's entropy is {found.student_entropy:.2f} nats, its teacher's {found.teacher_entropy:.2f}; "
        f"outside the teacher's likeliest ids it has {found.student_tail:.1%} of its mass, its teacher "
        f"{found.teacher_tail:.1%}.",
        "Take distill.divergence forward_kl (or js) in the place of reverse_kl, a sampled or hidden cache in the place "
        "of a top_k one, and a lower learning rate.",
    )


def _far(found: Agreement) -> bool:
    return found.kl > GAP_KL and found.student_nll - found.teacher_nll > GAP_NLL


# In this order; each verdict -> what it explains.
_EXPLAINS: dict[Callable[[DiagnosisInputs], Verdict | None], tuple[str, ...]] = {
    # A teacher without opinions is flat too, and to be far from it is no fault.
    teacher_weaker_than_labels: ("temperature_too_high", "alpha_too_low", KL_INCREASED, "far_from_teacher"),
    temperature_too_high: (
        "alpha_too_low",
        KL_INCREASED,
        "far_from_teacher",
    ),  # the soft gradient is small because of T
    temperature_too_low: ("alpha_too_low",),
    alpha_too_high: (),
    alpha_too_low: (KL_INCREASED, "far_from_teacher"),
    kl_increased: ("under_trained", "capacity_gap"),  # more steps would lead further away
    collapsed_tail: ("capacity_gap",),  # it is far because it is too sharp
    under_trained: ("capacity_gap", "far_from_teacher"),
    far_from_teacher: ("capacity_gap",),  # a student that lost to a baseline did not reach its capacity
    capacity_gap: (),
}
