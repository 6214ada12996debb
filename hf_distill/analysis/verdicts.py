"""Named failures of a distillation: from what was measured to a verdict with its advice. Pure functions."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean, stdev
from typing import Any

from .agreement import OFFSETS, Agreement

SHIFT = 0.75  # of the nats at its own place: another offset fits better below; a healthy pair is far above 1 there
PADDING = 0.01  # share of asked padding: none is right
CHANCE, HITS = 0.95, 3.0  # of log V; of 1 / V, but at least 1 %: a teacher that knows its ids is far from both
WEAKER = 0.05  # nats/token by which a teacher may lose to its student before it teaches nothing
FLAT = 0.93  # of log V: beyond, the soft gradient is mostly about ids that the teacher thinks unlikely
HARD = 0.15  # nats: below, the likeliest id has more than 97 % of the mass
IGNORED = 0.03  # share of the soft term's gradient below which it steers nothing
APART = 0.1  # nats/token: a student this close to its teacher does not ignore it
MISTAKES, COPIED, LED = 0.05, 0.5, 0.8  # of tokens, beyond what the teacher admits; of these; of the gradient
GAP_KL, GAP_NLL = 0.3, 0.15  # nats/token that are left when the loss no longer falls
TAIL, TAIL_LEFT = 0.01, 0.35  # mass of the teacher's tail; share of it that the student has left
SHARPER = 0.5  # of the teacher's entropy
FALLS, SURE = 0.03, 2.5  # of the loss, from the third to the last quarter of a run; in standard errors
_LOGS = 8  # fewer log lines say nothing about a trend


@dataclass(frozen=True)
class Verdict:
    """A failure: its name, what was seen, what to do."""

    name: str
    text: str
    advice: str


def verdicts(found: Agreement, logs: Sequence[Mapping[str, Any]], objective: Mapping[str, Any]) -> list[Verdict]:
    """What went wrong, the causes before what follows from them: with a wrong shift nothing else means anything.

    Args:
        found: what was measured.
        logs: of the training, in order; empty: unknown, and nothing is said about its course.
        objective: temperature and alpha.
    """
    for cause in (wrong_shift_or_mask, wrong_tokenizer):
        if verdict := cause(found, logs, objective):
            return [verdict]
    rest: list[Callable[..., Verdict | None]] = [
        teacher_weaker_than_labels,
        temperature_too_high,
        temperature_too_low,
        alpha_too_high,
        alpha_too_low,
        under_trained,
        capacity_gap,
        collapsed_tail,
    ]
    return [verdict for one in rest if (verdict := one(found, logs, objective))]


def wrong_shift_or_mask(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """Another offset fits better, or padding is asked."""
    seen = []
    for offset in OFFSETS:
        if found.label_at[offset] < SHIFT * found.label_at[0]:
            seen.append(
                f"the teacher predicts the label at offset {offset:+d} better ({found.label_at[offset]:.2f} nats, "
                f"{found.label_at[0]:.2f} for its own)"
            )
        if found.kl_at[0] > APART and found.kl_at[offset] < SHIFT * found.kl_at[0]:
            seen.append(
                f"the student is closer to the teacher's token at offset {offset:+d} ({found.kl_at[offset]:.2f} nats, "
                f"{found.kl_at[0]:.2f} to its own)"
            )
    if found.padding > PADDING:
        seen.append(f"{found.padding:.0%} of the asked tokens are padding after padding")
    if not seen:
        return None
    return Verdict(
        "wrong_shift_or_mask",
        "; ".join(seen).capitalize() + ".",
        "Labels stand at the same position as their input ids, and the trainer shifts them once: do not shift them in "
        "the data. Padding and prompts have the label -100. `hf-distill recipes preview` shows what is asked.",
    )


def wrong_tokenizer(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """The teacher does no better than chance."""
    chance = log(found.vocab_size)
    if found.teacher_nll < CHANCE * chance or found.teacher_accuracy > max(HITS / found.vocab_size, 0.01):
        return None
    return Verdict(
        "wrong_tokenizer",
        f"The teacher's nll of the labels is {found.teacher_nll:.2f} nats, and chance has {chance:.2f}.",
        "The ids do not mean to the teacher what they mean to the data: tokenise with the teacher's own tokenizer, and "
        "check that its weights were loaded (missing keys).",
    )


def teacher_weaker_than_labels(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """The student knows the labels better than its teacher."""
    if found.teacher_nll < found.student_nll + WEAKER:
        return None
    return Verdict(
        "teacher_weaker_than_labels",
        f"The teacher's nll of the labels is {found.teacher_nll:.2f} nats, the student's {found.student_nll:.2f}; the "
        f"teacher gives the label less than the student for {found.teacher_worse:.0%} of the tokens.",
        "Train the teacher on this data first, take another one, or lower distill.alpha: here the labels teach more.",
    )


def temperature_too_high(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """At T the teacher is nearly uniform."""
    most = log(found.vocab_size)
    if not objective["alpha"] or found.soft_entropy < FLAT * most or objective["temperature"] <= 1:
        return None
    return Verdict(
        "temperature_too_high",
        f"At T = {objective['temperature']:g} the teacher's entropy is {found.soft_entropy:.2f} of at most {most:.2f} "
        f"nats (T = 1: {found.teacher_entropy:.2f}): most of the soft gradient is about ids that it thinks unlikely.",
        "Lower distill.temperature; `hf-distill temperature` finds the one that serves.",
    )


def temperature_too_low(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """At T the teacher is nearly one-hot."""
    if not objective["alpha"] or found.soft_entropy > HARD:
        return None
    return Verdict(
        "temperature_too_low",
        f"At T = {objective['temperature']:g} the teacher's entropy is {found.soft_entropy:.3f} nats: its soft labels "
        "say little more than hard ones.",
        "Raise distill.temperature; `hf-distill temperature` finds the one that serves.",
    )


def alpha_too_high(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """The student copies mistakes of which the labels could have told it."""
    led = found.gradient.get("soft", 0.0)
    if found.excess_mistakes < MISTAKES or found.copied < COPIED or led < LED:
        return None
    return Verdict(
        "alpha_too_high",
        f"For {found.mistakes:.0%} of the tokens the teacher is sure of another id than the label "
        f"({found.excess_mistakes:.0%} more than it admits), and the student says the same for {found.copied:.0%} of "
        f"them; {led:.0%} of the gradient is the soft term's.",
        "Lower distill.alpha, so that the labels outweigh the teacher where it is wrong.",
    )


def alpha_too_low(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """The soft term steers nothing."""
    led = found.gradient.get("soft", 0.0)
    if led > IGNORED or found.kl < APART:
        return None
    return Verdict(
        "alpha_too_low",
        f"{led:.1%} of the gradient is the soft term's, and KL to the teacher is {found.kl:.2f} nats.",
        "Raise distill.alpha: as it is, this is training on hard labels.",
    )


def under_trained(found: Agreement, logs: Sequence[Mapping[str, Any]], objective: Any) -> Verdict | None:
    """The loss still falls at the end."""
    fall = _fall(logs)
    if fall is None or fall[0] < FALLS or fall[0] < SURE * fall[1]:
        return None
    return Verdict(
        "under_trained",
        f"The loss fell by {fall[0]:.1%} from the third to the last quarter of the steps.",
        "Raise train.max_steps, or train.learning_rate; `hf-distill curve` shows what more tokens would bring.",
    )


def capacity_gap(found: Agreement, logs: Sequence[Mapping[str, Any]], objective: Any) -> Verdict | None:
    """The loss falls no more, and the student is far from its teacher."""
    fall = _fall(logs)
    gap = found.student_nll - found.teacher_nll
    if fall is None or under_trained(found, logs, objective) or found.kl < GAP_KL or gap < GAP_NLL:
        return None
    return Verdict(
        "capacity_gap",
        f"The loss has stopped falling, and the student is {found.kl:.2f} nats from its teacher, {gap:.2f} behind it "
        "on the labels.",
        "Take a larger student, or go through students in between (`stages`, see the recipe progressive); if the "
        "learning rate was tiny at the end, or train.max_steps were few, train longer first.",
    )


def collapsed_tail(found: Agreement, logs: Any, objective: Any) -> Verdict | None:
    """The student is far surer than its teacher."""
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


def _fall(logs: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """(how much the loss fell from the third quarter to the last, relative; its standard error); None: unknown."""
    losses = [log["loss"] for log in logs if "loss" in log]
    if len(losses) < _LOGS:
        return None
    quarter = len(losses) // 4
    third, last = losses[-2 * quarter : -quarter], losses[-quarter:]
    error = ((stdev(third) ** 2 + stdev(last) ** 2) / quarter) ** 0.5
    return (fmean(third) - fmean(last)) / fmean(third), error / fmean(third)
