"""Several sources, mixed example by example."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets, interleave_datasets
from transformers.utils import logging

from ..core.schedule import Points, value_at
from ..errors import DistillError
from .load import Examples

logger = logging.get_logger(__name__)


def shares(weights: Mapping[str, float]) -> list[float]:
    """The sources' weights, normalised to sum to 1.

    Raises:
        DistillError: a weight that is not above 0.
    """
    wrong = {name: weight for name, weight in weights.items() if not weight > 0}
    if wrong:
        raise DistillError(f"Weights of sources must be above 0: {wrong}. Leave a source out to give it none.")
    total = sum(weights.values())
    found = [weight / total for weight in weights.values()]
    if abs(total - 1) > 1e-6:
        said = ", ".join(f"{name} {share:.3f}" for name, share in zip(weights, found, strict=True))
        logger.warning(f"Weights of the sources sum to {total:g}; they count as shares: {said}.")
    return found


def add_source_column(rows: Examples, source: int) -> Examples:
    """The same rows, each with its source's index in `source`."""
    features = None if rows.features is None else Features({**rows.features, "source": Value("int64")})

    def own(batch: dict) -> dict:
        return {"source": [source] * len(next(iter(batch.values())))}

    return rows.map(own, batched=True, features=features)


def mix(
    rows: Mapping[str, Examples], weights: Mapping[str, float], seed: int, stopping_strategy: str = "first_exhausted"
) -> Examples:
    """Rows of all sources in a random order, each drawn from a source with its share of the weights.

    Args:
        rows: name of a source -> its rows.
        weights: name of a source -> weight, above 0; they need not sum to 1.
        seed: of the order.
        stopping_strategy: as in `datasets.interleave_datasets`: when a source is exhausted, or when all are.

    Returns:
        the rows, with `source`, the index of the source; a single source is returned as it is.

    Raises:
        DistillError: a weight that is not above 0; paraphrases in some of the sources alone.
    """
    if len(rows) == 1:
        return next(iter(rows.values()))
    _check_paraphrases(rows)
    parts: list[Any] = [add_source_column(part, index) for index, part in enumerate(rows.values())]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [part if isinstance(part, IterableDataset) else part.to_iterable_dataset() for part in parts]
    probabilities = shares({name: weights[name] for name in rows})
    strategy: Any = stopping_strategy
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy=strategy)


def mix_scheduled(rows: Mapping[str, Dataset], weights: Mapping[str, Points], seed: int, count: int) -> Dataset:
    """Rows of all sources, drawn with shares that change on the way; a source that is exhausted begins again.

    Args:
        rows: name of a source -> its rows, which are shuffled.
        weights: name of a source -> its weight over progress, see `schedule`; they need not sum to 1.
        seed: of the order.
        count: how many rows, which must be trained in their order; row i is drawn at progress i / count.

    Returns:
        the rows, with `source`, the index of the source.

    Raises:
        DistillError: at some moment all weights are 0; paraphrases in some of the sources alone.
    """
    _check_paraphrases(rows)
    moments = sorted({0.0, 1.0, *(at for points in weights.values() for at, _ in points)})
    empty = [moment for moment in moments if sum(value_at(points, moment) for points in weights.values()) <= 0]
    if empty:
        raise DistillError(f"At progress {empty[0]:g} all weights of sources are 0: one of them must be above.")
    progress = np.arange(count) / max(count, 1)
    curves = [np.array(weights[name]).T for name in rows]
    heights = np.stack([np.interp(progress, at, height) for at, height in curves])
    limits = heights.cumsum(0) / heights.sum(0)
    source = (np.random.default_rng(seed).random(count) >= limits[:-1]).sum(0)
    parts = [add_source_column(part.shuffle(seed=seed), index) for index, part in enumerate(rows.values())]
    chosen, start = np.empty(count, dtype=np.int64), 0
    for index, (name, part) in enumerate(zip(rows, parts, strict=True)):
        own = np.flatnonzero(source == index)
        if len(own) > len(part):
            logger.warning(f"Source {name}: {len(own)} rows are drawn of {len(part)}, which repeat.")
        chosen[own] = start + np.arange(len(own)) % len(part)
        start += len(part)
    return concatenate_datasets(parts).select(chosen)


def _check_paraphrases(rows: Mapping[str, Examples]) -> None:
    columns = {name: part.column_names or list(next(iter(part), ())) for name, part in rows.items()}
    lacking = [name for name, own in columns.items() if "view_input_ids" not in own]
    if 0 < len(lacking) < len(rows):
        raise DistillError(
            f"The sources {', '.join(lacking)} have no paraphrases, and the others do: give them a column "
            "`paraphrase`, or read none with paraphrase=True."
        )
