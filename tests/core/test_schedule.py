"""Schedules: their forms, values and integrals."""

import numpy as np
import pytest

from hf_distill import DistillError
from hf_distill.core.schedule import parse_schedule, schedule_integral, value_at


@pytest.mark.parametrize("value", [0.3, [[0, 0.3]], "0.3", "[[0.5, 0.3]]"])
def test_a_single_value_is_constant(value):
    points = parse_schedule(value, "x", 0, 1)
    assert [value_at(points, at) for at in (0, 0.4, 1)] == [0.3] * 3
    assert schedule_integral(points, 0.5) == pytest.approx(0.15)


def test_schedules_are_linear_between_points_and_constant_outside():
    points = parse_schedule([[0.2, 1.0], [0.6, 0.0], [0.8, 0.5]], "x", 0, 1)
    at = np.linspace(0, 1, 41)
    assert [value_at(points, x) for x in at] == pytest.approx(np.interp(at, *zip(*points, strict=True)))


def test_the_integral_is_that_of_a_fine_sum():
    points = parse_schedule([[0.2, 1.0], [0.6, 0.0], [0.8, 0.5]], "x", 0, 1)
    fine = (np.arange(100_000) + 0.5) / 100_000
    for end in (0.1, 0.2, 0.5, 0.77, 1.0):
        expected = np.interp(fine[fine < end], *zip(*points, strict=True)).sum() / 100_000
        assert schedule_integral(points, end) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("half", "x is 'half'; give a number, or points"),
        ([], r"x is \[\]; give a number, or points"),
        ([[0, 1, 2]], "give a number, or points"),
        ([[0, True]], "give a number, or points"),
        (None, "give a number, or points"),
        (float("nan"), "give a number, or points"),
        ([[0, 0.5], [0, 0.7]], "progress must rise from point to point"),
        ([[0, 0.5], [2, 0.7]], "within"),
        ([[0, 0.5], [1, 1.7]], r"it must lie in \[0, 1\]"),
        (-0.1, r"x is -0.1; it must lie in \[0, 1\]"),
    ],
)
def test_what_is_no_schedule_is_refused(value, problem):
    with pytest.raises(DistillError, match=problem):
        parse_schedule(value, "x", 0, 1)
