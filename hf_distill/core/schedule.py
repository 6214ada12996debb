"""Schedules: values that change during training, as functions of its progress in [0, 1], without saved state.

A schedule is a number, or points [[progress, value], ...] with progress from 0 to 1. It is linear between two points,
and constant before the first point and after the last.
"""

import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeAlias

from ..errors import DistillError

Points: TypeAlias = tuple[tuple[float, float], ...]


def parse_schedule(value: object, name: str, low: float, high: float = math.inf) -> Points:
    """Return the points of a schedule.

    Args:
        value: a number, points, or either as JSON.
        name: name of the setting, for the error message.
        low: smallest allowed value.
        high: largest allowed value.

    Returns:
        (progress, value) of each point.

    Raises:
        DistillError: `value` is none of these, progress does not increase from point to point within [0, 1], or a
            value is out of range.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise DistillError(f"{name} is {value!r}; {_SHAPE}") from None
    pairs: Sequence = value if isinstance(value, Sequence) else [[0.0, value]]
    if not pairs or not all(isinstance(point, Sequence) and len(point) == 2 for point in pairs):
        raise DistillError(f"{name} is {value!r}; {_SHAPE}")
    if not all(_is_number(x) for point in pairs for x in point):
        raise DistillError(f"{name} is {value!r}; {_SHAPE}")
    points = tuple((float(at), float(y)) for at, y in pairs)
    if not (points[0][0] >= 0 and points[-1][0] <= 1 and all(a < b for (a, _), (b, _) in pairwise(points))):
        raise DistillError(f"{name} is {value!r}; progress must rise from point to point, within [0, 1]")
    if not all(low <= y <= high for _, y in points):
        span = f"lie in [{low:g}, {high:g}]" if high < math.inf else f"be at least {low:g}"
        raise DistillError(f"{name} is {value!r}; it must {span}")
    return points


_SHAPE = "give a number, or points [[progress, value], ...] with progress from 0 to 1"


def _is_number(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


def value_at(points: Points, progress: float) -> float:
    """Return the value of a schedule.

    Args:
        points: see `parse_schedule`.
        progress: progress of training, in [0, 1].
    """
    for (start, low), (end, high) in pairwise(points):
        if start <= progress < end:
            return low + (high - low) * (progress - start) / (end - start)
    return points[0][1] if progress < points[0][0] else points[-1][1]


def schedule_integral(points: Points, progress: float) -> float:
    """Return the integral of a schedule from 0 to `progress`; for a constant c it is c * progress.

    Args:
        points: see `parse_schedule`.
        progress: progress of training, in [0, 1].
    """
    knots = sorted({0.0, progress, *(at for at, _ in points if 0 < at < progress)})
    return sum((b - a) * (value_at(points, a) + value_at(points, b)) / 2 for a, b in pairwise(knots))
