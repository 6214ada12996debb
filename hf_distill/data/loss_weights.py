"""The column `weight` of the rows of a source, computed from another column, such as a score."""

import math
import numbers
from collections.abc import Sequence
from typing import cast

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from ..core.row_values import WEIGHT
from ..errors import DistillError, did_you_mean
from .checks import by_row
from .formats import TEXT
from .json_files import map_exactly


def with_loss_weights(
    rows: Dataset | IterableDataset, column: str, temperature: float | None, where: str
) -> Dataset | IterableDataset:
    """Return rows with a column `weight`, which replaces one that they have.

    Without a temperature the weight is the value of the column. With a temperature T it is exp(s / T) of the value s,
    divided by the mean over all rows, as in reward-weighted regression (Peters and Schaal, 2007).

    Args:
        rows: a data set or a stream.
        column: column with a number in each row.
        temperature: None, or a number above 0.
        where: name of the source in errors.

    Raises:
        DistillError: there is no such column, a value is no finite number, or it is negative and there is no
            temperature.
    """
    check_weight_column(column, rows.column_names or list(next(iter(rows))), where)
    read = by_row(lambda row: {WEIGHT: weight_value(row[column], column, temperature is None)}, rows, where)
    if temperature is None:
        return map_exactly(rows, read, _features(rows))
    assert isinstance(rows, Dataset)  # a recipe cannot take the mean over a stream
    scores = rows.select_columns([column]).with_format(None)
    values = np.array([read(row, number)[WEIGHT] for number, row in enumerate(scores)])
    powers = np.exp((values - values.max()) / temperature)
    weights = powers / powers.mean()
    return map_exactly(rows, lambda row, number: {WEIGHT: float(weights[number])}, _features(rows))


def check_weight_column(column: str, columns: Sequence[str], where: str) -> None:
    """Check that rows have the column of their weights.

    Args:
        column: The column of the weights.
        columns: The columns of the rows.
        where: Name of the source in errors.

    Raises:
        DistillError: They do not have it.
    """
    if column not in columns:
        reason = "; text sources are joined and cut into rows, which have no columns" if [*columns] == [TEXT] else ""
        raise DistillError(
            f"{where}: loss_weight names the column {column!r}, which the source does not have"
            f"{reason or did_you_mean(column, columns)}"
        )


def weight_value(value: object, column: str, is_weight: bool) -> float:
    """Return the value of a column of weights.

    Args:
        value: The value.
        column: The column.
        is_weight: Whether the value itself is the weight, and not a score with a temperature.

    Raises:
        DistillError: It is no finite number, or it is negative and is the weight.
    """
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not math.isfinite(number):
        raise DistillError(
            f"column {column}: loss_weight needs a finite number in each row; found {value!r}. Leave the row out, or "
            "name another column"
        )
    if is_weight and number < 0:
        raise DistillError(
            f"column {column}: {number} cannot be the factor of a loss, which is at least 0. Set a temperature, such "
            f"as loss_weight: {{column: {column}, temperature: 1.0}}, which gives exp({column} / temperature)"
        )
    return number


def _features(rows: Dataset | IterableDataset) -> Features | None:
    if rows.features is None:
        return None
    return Features({**cast(Features, rows.features), WEIGHT: Value("float32")})
