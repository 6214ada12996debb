"""Mixes several sources, example by example."""

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets
from transformers.utils import logging

from ..core.defaults import STOPPING_STRATEGY
from ..core.row_values import ORIGIN, WEIGHT
from ..core.schedule import Points, value_at
from ..errors import DistillError
from .formats import PARAPHRASE, TEACHER_PROMPT
from .load import Examples

StoppingStrategy: TypeAlias = Literal["first_exhausted", "all_exhausted", "all_exhausted_without_replacement"]
logger = logging.get_logger(__name__)


def shares(weights: Mapping[str, float]) -> list[float]:
    """Return the weights of the sources, normalized to sum to 1.

    Raises:
        DistillError: a weight is not above 0.
    """
    wrong = {name: weight for name, weight in weights.items() if not weight > 0}
    if wrong:
        raise DistillError(f"Weights of sources must be above 0, but got {wrong}. Remove a source to not use it.")
    total = sum(weights.values())
    normalized = [weight / total for weight in weights.values()]
    if abs(total - 1) > 1e-6:
        text = ", ".join(f"{name} {share:.3f}" for name, share in zip(weights, normalized, strict=True))
        logger.warning(f"The weights of the sources sum to {total:g} and are normalized to shares: {text}.")
    return normalized


def add_source_column(rows: Examples, source: int) -> Examples:
    """Return the same rows with a column `source`, the index of their source.

    Args:
        rows: the rows of one source.
        source: index of the source.

    Returns:
        the rows with the column.
    """
    features = None if rows.features is None else Features({**rows.features, "source": Value("int64")})

    def source_column(batch: dict) -> dict:
        return {"source": [source] * len(next(iter(batch.values())))}

    return rows.map(source_column, batched=True, features=features)


def mix(
    rows: Mapping[str, Examples],
    weights: Mapping[str, float],
    seed: int,
    stopping_strategy: StoppingStrategy = STOPPING_STRATEGY,
) -> Examples:
    """Mix the rows of all sources in random order; the source of each row is drawn with its share of the weights.

    Args:
        rows: name of a source -> its rows.
        weights: name of a source -> weight, above 0; the weights need not sum to 1.
        seed: seed of the order.
        stopping_strategy: as in `datasets.interleave_datasets`: stop when one source is exhausted, or when all are.

    Returns:
        the rows, with a column `source`, the index of the source; a single source is returned unchanged.

    Raises:
        DistillError: a weight is not above 0, or only some of the sources have a second prompt, `weight` or `origin`.
    """
    if len(rows) == 1:
        return next(iter(rows.values()))
    _check_equal_columns(rows)
    parts: list[Any] = [add_source_column(part, index) for index, part in enumerate(rows.values())]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [part if isinstance(part, IterableDataset) else part.to_iterable_dataset() for part in parts]
    probabilities = shares({name: weights[name] for name in rows})
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy=stopping_strategy)


def mix_scheduled(rows: Mapping[str, Dataset], weights: Mapping[str, Points], seed: int, count: int) -> Dataset:
    """Mix the rows of all sources with shares that change during training; an exhausted source starts again.

    Args:
        rows: name of a source -> its rows, which are shuffled.
        weights: name of a source -> its weight over progress, see `schedule`; the weights need not sum to 1.
        seed: seed of the order.
        count: number of rows N, which must be trained in their order; row i is drawn at progress i / N.

    Returns:
        the rows, with a column `source`, the index of the source.

    Raises:
        DistillError: all weights are 0 at the same progress, or only some of the sources have a second prompt, `weight`
            or `origin`.
    """
    _check_equal_columns(rows)
    moments = sorted({0.0, 1.0, *(at for points in weights.values() for at, _ in points)})
    empty = [moment for moment in moments if sum(value_at(points, moment) for points in weights.values()) <= 0]
    if empty:
        raise DistillError(f"At progress {empty[0]:g} all weights of sources are 0; at least one must be above 0.")
    progress = np.arange(count) / max(count, 1)
    curves = [np.array(weights[name]).T for name in rows]
    heights = np.stack([np.interp(progress, at, height) for at, height in curves])
    limits = heights.cumsum(0) / heights.sum(0)
    source = (np.random.default_rng(seed).random(count) >= limits[:-1]).sum(0)
    parts = [add_source_column(part.shuffle(seed=seed), index) for index, part in enumerate(rows.values())]
    chosen, start = np.empty(count, dtype=np.int64), 0
    for index, (name, part) in enumerate(zip(rows, parts, strict=True)):
        drawn = np.flatnonzero(source == index)
        if len(drawn) > len(part):
            logger.warning(
                f"Source {name}: {len(drawn)} rows are drawn from {len(part)} rows, so rows of this source repeat."
            )
        chosen[drawn] = start + np.arange(len(drawn)) % len(part)
        start += len(part)
    return concatenate_datasets(parts).select(chosen)


def _check_equal_columns(rows: Mapping[str, Examples]) -> None:
    columns = {name: part.column_names or list(next(iter(part), ())) for name, part in rows.items()}
    for column in (WEIGHT, ORIGIN):
        lacking = [name for name, names in columns.items() if column not in names]
        if 0 < len(lacking) < len(rows):
            raise DistillError(
                f"The sources {', '.join(lacking)} have no column `{column}`, but the others do: give every row one, "
                "or remove the column from all sources."
            )
    for second in (PARAPHRASE, TEACHER_PROMPT):
        lacking = [name for name, names in columns.items() if second.columns[0] not in names]
        if 0 < len(lacking) < len(rows):
            raise DistillError(
                f"The sources {', '.join(lacking)} have no {second.column}, but the others do: give them a column "
                f"`{second.column}`, or tokenize all sources without it."
            )
