"""Several sources, mixed example by example."""

from collections.abc import Mapping
from typing import Any

from datasets import Features, IterableDataset, Value, interleave_datasets
from transformers.utils import logging

from ..errors import DistillError
from .load import Examples
from .rows import ROW

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


def tag(rows: Examples, source: int) -> Examples:
    """The same rows, each with its source's index in `source`."""
    features = Features({**ROW, "source": Value("int64")})
    return rows.map(lambda batch: {"source": [source] * len(batch["input_ids"])}, batched=True, features=features)


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
        DistillError: a weight that is not above 0.
    """
    if len(rows) == 1:
        return next(iter(rows.values()))
    parts: list[Any] = [tag(part, index) for index, part in enumerate(rows.values())]
    if any(isinstance(part, IterableDataset) for part in parts):
        parts = [part if isinstance(part, IterableDataset) else part.to_iterable_dataset() for part in parts]
    probabilities = shares({name: weights[name] for name in rows})
    strategy: Any = stopping_strategy
    return interleave_datasets(parts, probabilities=probabilities, seed=seed, stopping_strategy=strategy)
