"""Each failure mode is named, and what only resembles one is not; on either side of each threshold."""

from dataclasses import replace
from math import log

import numpy as np
import pytest
from provoked import CASES, build_model, healthy
from scipy.stats import linregress

from hf_distill.analysis.agreement import Agreement
from hf_distill.analysis.closeness import NO_REFERENCES, HeldOut, References
from hf_distill.analysis.diagnosis import diagnose
from hf_distill.analysis.tokenizer_check import TokenizerCheck
from hf_distill.analysis.trend import KlTrend, kl_trend_of, trend_of
from hf_distill.analysis.verdicts import DiagnosisInputs, verdicts

V = 50_000
GOOD = Agreement(
    tokens=4096,
    vocab_size=V,
    kl=0.05,
    kl_at={-1: 6.0, 0: 0.05, 1: 5.5},
    agreement=0.9,
    pearson=0.9,
    spearman=0.9,
    teacher_entropy=2.6,
    student_entropy=2.7,
    teacher_nll=2.7,
    student_nll=2.72,
    counts_nll=6.0,
    label_at={-1: 10.0, 0: 2.7, 1: 8.5},
    teacher_worse=0.4,
    below_counts=0.15,
    teacher_accuracy=0.45,
    student_accuracy=0.44,
    confident_teacher_errors=0.1,
    excess_errors=0.01,
    copied_errors=0.8,
    teacher_tail=0.08,
    student_tail=0.09,
    soft_entropy=0.77 * log(V),
    soft_tail=0.02,
    gradient={"soft": 0.2, "hard": 0.8},
    target_share=0.99,
    padding=0.0,
    special=0.0,
    positions=[],
    sources=[],
)


def lines(losses, rates=None):
    rates = [1.0] * len(losses) if rates is None else rates
    return [{"loss": loss, "learning_rate": rate} for loss, rate in zip(losses, rates, strict=True)]


def noisy(losses, scale=0.002):
    return [loss + scale * (-1) ** i for i, loss in enumerate(losses)]


FLAT = trend_of(lines(noisy([3.0] * 24)))
FALLING = trend_of(lines(noisy([4.0 - 0.05 * i for i in range(24)])))


def names(alpha=0.5, temperature=2.0, trend=FLAT, tokenizer=None, references=NO_REFERENCES, kl_trend=None, **measured):
    agreement = replace(GOOD, **measured)
    inputs = DiagnosisInputs(agreement, temperature, alpha, trend, tokenizer, references, kl_trend)
    return [verdict.name for verdict in verdicts(inputs)]


def test_a_healthy_pair_has_no_verdict():
    assert names() == names(trend=None) == names(tokenizer=TokenizerCheck(8, 1.0, 0.0, 0)) == []


FAR = {"kl": 0.9, "student_nll": 3.2}
MEASURED = {
    "wrong_shift_or_mask": [
        {"label_at": {-1: 1.9, 0: 2.7, 1: 8.0}},
        {"kl": 0.5, "kl_at": {-1: 5.0, 0: 0.5, 1: 0.3}},
        {"padding": 0.02},
    ],
    "wrong_tokenizer": [
        {"teacher_nll": 9.7, "below_counts": 0.9},
        {"tokenizer": TokenizerCheck(8, 0.9, 0.0, 3)},
        {"tokenizer": TokenizerCheck(8, 0.9, 0.1, 0)},
    ],
    "teacher_weaker_than_labels": [{"teacher_nll": 2.9}],
    "temperature_too_high": [{"temperature": 8.0, "soft_entropy": 0.99 * log(V), "soft_tail": 0.9}],
    "temperature_too_low": [{"temperature": 0.1, "soft_entropy": 0.1}],
    "alpha_too_high": [{"excess_errors": 0.1, "gradient": {"soft": 0.9, "hard": 0.1}}],
    "alpha_too_low": [{"kl": 0.3, "gradient": {"soft": 0.01, "hard": 0.99}}],
    "under_trained": [{"trend": FALLING}],
    "capacity_gap": [FAR],
    "far_from_teacher": [
        {"trend": None, "kl": 13.7, "student_nll": 13.9},  # worse than a unigram baseline, and than a uniform one
        {"trend": None, "kl": 3.3, "student_nll": 6.0},
        {"trend": None, "kl": 8.3, "teacher_entropy": 2.6},
        {"alpha": 0.0, "student_nll": 6.1, "gradient": {"hard": 1.0}},
        {"kl": 0.5, "references": References(before=HeldOut(3.0, 0.55))},
        {"kl": 0.5, "references": References(before=HeldOut(2.0, 0.2))},  # training moved it away
        {"references": References(before=HeldOut(3.0, 0.55), after=HeldOut(2.9, 0.5))},
        {"kl": 0.5, "references": References(control=HeldOut(2.71, 0.4))},
    ],
    "kl_increased": [
        {"kl": 0.9, "kl_trend": KlTrend(0.5, 20, 0.9, True)},
        FAR | {"trend": FALLING, "kl_trend": KlTrend(0.5, 20, 0.9, True)},
    ],
    "collapsed_tail": [{"student_tail": 0.01}, {"student_entropy": 1.0}],
}


@pytest.mark.parametrize(("name", "measured"), [(name, one) for name, cases in MEASURED.items() for one in cases])
def test_each_failure_is_the_only_verdict(name, measured):
    assert names(**measured) == [name]


@pytest.mark.parametrize(
    "measured",
    [
        {"kl_at": {-1: 0.01, 0: 0.05, 1: 0.01}},  # so close that differences between offsets are noise
        {"label_at": {}, "kl_at": {}},
        {"teacher_nll": 6.5, "student_nll": 6.6, "below_counts": 0.5},  # confident and wrong, but not on other ids
        {"soft_entropy": 0.99 * log(V), "soft_tail": 0.2},  # flat, but the likely ids dominate the gradient
        {"soft_tail": 0.9},  # the teacher is not flat: the gradient in the tail comes from the student's errors
        {"temperature": 1.0, "soft_entropy": 0.99 * log(V), "soft_tail": 0.9},  # T = 1 changes nothing
        {"excess_errors": 0.1},  # the labels dominate the gradient
        {"excess_errors": 0.1, "copied_errors": 0.3, "gradient": {"soft": 1.0}},
        {"gradient": {"soft": 0.01, "hard": 0.99}},  # close to its teacher nevertheless
        {"kl": 0.9},  # far from the teacher, but as good on the labels
        {"trend": None} | FAR,
        {"trend": None, "references": References(before=HeldOut(4.0, 2.0), control=HeldOut(3.3, 1.1))} | FAR,
        {"references": References(before=HeldOut(2.72, 0.05))},  # it was as close before
        {"kl": 0.5, "references": References(control=HeldOut(2.8, 0.4))},  # the control knows the labels less
        {"kl": 0.9, "kl_trend": KlTrend(0.88, 20, 0.9, False)},
        {"kl_trend": KlTrend(0.01, 20, 0.07, True)},  # close nevertheless
        {"alpha": 0.0, "gradient": {"hard": 1.0}, "kl_trend": KlTrend(0.5, 20, 0.9, True)},
        {"alpha": 0.0, "gradient": {"hard": 1.0}, "kl": 9.0},  # without a soft term only the labels count
        {"alpha": 0.0, "gradient": {"hard": 1.0}, "soft_entropy": 0.0} | FAR,  # trained without teacher logits
        {"teacher_tail": 0.005, "student_tail": 0.001},  # the teacher has no tail
    ],
)
def test_measurements_that_only_resemble_a_failure_give_no_verdict(measured):
    assert names(**measured) == []


def test_malformed_results_give_no_references():
    models = {"before": {"perplexity": 20.0, "kl": 2.0}, "student": {"perplexity": 10.0}, "control": {"kl": 1.0}}
    assert References.of_evidence({"models": models}, "student") == References(
        HeldOut(log(20), 2.0), None, HeldOut(log(10), None)
    )
    broken = [[], 5, {}, {"models": []}, {"models": {"before": [], "student": {"perplexity": "x"}}}]
    broken += [{"models": {"before": {"perplexity": value}}} for value in (0, -1, True, float("nan"))]
    for evidence in broken:
        assert References.of_evidence(evidence, "student") == NO_REFERENCES, evidence


def test_a_failure_that_another_explains_is_not_named():
    """Its advice would be misleading: to raise alpha although the teacher is weak."""
    small_gradient = {"kl": 0.9, "gradient": {"soft": 0.01, "hard": 0.99}}
    assert names(teacher_nll=3.5, **small_gradient) == ["teacher_weaker_than_labels"]
    high = {"temperature": 8.0, "soft_entropy": 0.99 * log(V), "soft_tail": 0.9}
    assert names(**small_gradient, **high) == ["temperature_too_high"]
    assert names(trend=FALLING, **FAR) == ["under_trained"]
    assert names(student_entropy=0.5, **FAR) == ["collapsed_tail"]
    assert names(padding=0.2, teacher_nll=9.7, below_counts=0.9) == ["wrong_shift_or_mask"]


def test_independent_failures_are_all_named():
    assert names(trend=FALLING, student_tail=0.01) == ["collapsed_tail", "under_trained"]


def cosine(steps):
    return [max(0.0, 1 - i / steps) for i in range(steps)]


def test_a_loss_that_the_schedule_flattened_is_no_capacity_gap():
    """A cosine schedule flattens every loss; the capacity shows while the learning rate is high."""
    falling = [4.0 - 0.08 * i for i in range(14)] + [2.9] * 10
    trend = trend_of(lines(noisy(falling), cosine(24)))
    assert trend.at_end.flat
    assert names(trend=trend, **FAR) == ["under_trained"]
    assert names(trend=trend) == []  # it is close to its teacher
    level = trend_of(lines(noisy([4.0, 3.5] + [3.0] * 22), cosine(24)))
    assert names(trend=level, **FAR) == ["capacity_gap"]


def test_a_noisy_loss_neither_falls_nor_is_flat():
    trend = trend_of(lines(noisy([3.0 - 0.02 * i for i in range(24)], scale=0.6)))
    assert not trend.at_end.falls
    assert not trend.at_end.flat
    assert names(trend=trend, **FAR) == []


def test_a_soft_loss_near_zero_that_halves_does_not_count_as_falling():
    assert not trend_of(lines(noisy([0.04 / (1 + i) for i in range(24)], scale=0.0001))).at_end.falls


def test_the_fall_equals_that_of_a_regression_line_over_the_last_half():
    losses = [4.0 - 0.05 * i for i in range(24)]
    end = trend_of(lines(noisy(losses))).at_end
    assert end.nats == pytest.approx(0.3, abs=0.01)
    assert end.before == pytest.approx(sum(losses[12:18]) / 6, abs=0.01)
    noise = [0.3 * (-1) ** i for i in range(24)]
    trend = trend_of(lines([loss + error for loss, error in zip(losses, noise, strict=True)])).at_end
    x = np.arange(12)
    fit = linregress(x, np.array(losses[12:]) + np.array(noise[12:]))
    assert trend.error == pytest.approx(6 * fit.stderr)


def test_a_rising_kl_is_distinguished_from_a_falling_one_and_from_noise():
    def evaluated(*values):
        return [{"step": 10 * i, "eval_kl": value, "eval_loss": 1.0} for i, value in enumerate(values)]

    assert kl_trend_of(evaluated(3.0, 0.5, 0.9)) == KlTrend(0.5, 10, 0.9, True)
    assert not kl_trend_of(evaluated(3.0, 0.9, 0.92)).rises
    assert not kl_trend_of(evaluated(3.0, 0.9, 0.5)).rises
    assert not kl_trend_of(evaluated(3.0, float("nan"), 0.5)).rises
    assert kl_trend_of(evaluated(3.0)) is None

    def steps(values):
        return [{"step": i + 1, "loss": 3.0, "kl": value} for i, value in enumerate(values)]

    rising = kl_trend_of(steps(noisy([0.5 + 0.03 * i for i in range(24)])))
    assert rising.rises
    assert (rising.lowest, rising.last) == (pytest.approx(0.5 + 0.03 * 14.5, abs=0.02), pytest.approx(1.12, abs=0.02))
    assert not kl_trend_of(steps(noisy([2.0 - 0.03 * i for i in range(24)]))).rises
    assert not kl_trend_of(steps(noisy([1.0] * 24, scale=0.5))).rises
    assert kl_trend_of(steps([0.5] * 7)) is None


def test_too_few_log_lines_give_no_trend():
    assert trend_of(lines([3.0] * 7)) is None
    assert trend_of([{"eval_loss": 1.0}] * 20) is None
    assert trend_of([{"loss": 3.0}] * 12) is not None  # a log without learning rates


@pytest.mark.parametrize("name", CASES)
def test_a_provoked_failure_is_named(name):
    pair, logs = CASES[name](0)
    diagnosis = diagnose(pair, None, logs)
    assert name in [verdict.name for verdict in diagnosis.verdicts]
    assert diagnosis.not_looked_at == []
    assert all(verdict.text.endswith(".") and verdict.advice.endswith(".") for verdict in diagnosis.verdicts)


def test_a_healthy_run_has_no_verdict():
    pair, logs = healthy(0)
    assert diagnose(pair, None, logs).verdicts == []


def test_a_check_with_a_verdict_is_not_listed_as_skipped():
    """The loss fell while the learning rate was high, and is noisy at the end."""
    losses = [4.0 - 0.15 * i for i in range(13)] + [2.0 + 0.5 * (-1) ** i for i in range(11)]
    pair, _ = CASES["wrong_shift_or_mask"](0)
    pair = replace(pair, rows=healthy(0)[0].rows)
    diagnosis = diagnose(pair, 500, lines(losses, cosine(24)))
    assert not trend_of(lines(losses, cosine(24))).at_end.flat
    assert [verdict.name for verdict in diagnosis.verdicts] == ["under_trained"]
    assert diagnosis.not_looked_at == []


def test_without_logs_no_verdict_on_the_training_is_made():
    pair, _ = CASES["under_trained"](0)
    diagnosis = diagnose(pair, None)
    assert not {"under_trained", "capacity_gap"} & {verdict.name for verdict in diagnosis.verdicts}
    assert "train.logging_steps" in diagnosis.not_looked_at[0]


def test_an_untrained_student_is_named_without_a_log():
    """Closeness is judged without a log, and a run with skipped checks is not called healthy."""
    pair, logs = healthy(0)
    untrained = pair.with_student(build_model(7, 16))
    for lines_of_log in ((), logs):
        diagnosis = diagnose(untrained, None, lines_of_log)
        assert "far_from_teacher" in [verdict.name for verdict in diagnosis.verdicts]
    assert diagnose(pair, None, logs).conclusion == "No failure was found."
    skipped = diagnose(pair, None)
    assert skipped.verdicts == []
    assert skipped.conclusion.startswith("The run could not be judged")
