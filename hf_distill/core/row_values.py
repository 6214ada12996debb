"""Columns of a data set that decide how a row is trained: `weight`, and `origin`, the author of its target tokens.

Imports no torch, because recipes are checked without it.
"""

import math
import numbers

from ..errors import DistillError, did_you_mean

WEIGHT = "weight"  # column, and key of a batch: factor of the losses of each row [B] or token [B, S]
ORIGIN = "origin"  # column, and key of a batch: index in `ORIGINS` of each row [B] or token [B, S]
ORIGINS = ("teacher", "student", "data")


def check_weight(value: object) -> float:
    """Return the weight of a row.

    Raises:
        DistillError: it is not a finite number of at least 0.
    """
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if math.isfinite(number) and number >= 0:
        return number
    raise DistillError(
        f"column {WEIGHT}: it must be a finite number of at least 0, the factor of the losses of the row; found "
        f"{value!r}. Give every row a weight (1 leaves its losses as they are), or remove or rename the column."
    )


def origin_index(value: object) -> int:
    """Return the index in `ORIGINS` of the origin of a row, which is given by its name or its index.

    Raises:
        DistillError: it is none of them.
    """
    if isinstance(value, str) and value in ORIGINS:
        return ORIGINS.index(value)
    index = int(value) if isinstance(value, numbers.Integral) and not isinstance(value, bool) else -1
    if 0 <= index < len(ORIGINS):
        return index
    suggestion = did_you_mean(value, ORIGINS) if isinstance(value, str) else f"; known: {', '.join(ORIGINS)}"
    raise DistillError(
        f"column {ORIGIN}: it must be the author of the target tokens of the row; found {value!r}, which is no "
        f"origin{suggestion}. Give every row an origin, or remove or rename the column."
    )
