"""Metrics of a whole evaluation that are no means over targets: F1, and correlations.

A metric that is undefined for the data is left out, as the correlation with labels that are all the same.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

TRUE_POSITIVES, PREDICTED, LABELED = "true_positives", "predicted", "labeled"


def class_counts(
    labels: Tensor, predictions: Tensor, counts: Tensor, rows: Tensor, num_rows: int, num_classes: int
) -> dict[str, Tensor]:
    """Count for each row and class its true positives, its predictions and its labels: name -> [B, C].

    Args:
        labels: [T] classes.
        predictions: [T] classes, as any dtype.
        counts: [T] 1 for each target that counts, 0 for one that was not measured.
        rows: [T] indices of the rows of the batch.
        num_rows: B.
        num_classes: C.
    """
    predictions, counts = predictions.long(), counts.double()
    weights = {TRUE_POSITIVES: counts * (labels == predictions), PREDICTED: counts, LABELED: counts}
    tables = {}
    for name, weight in weights.items():
        index = rows * num_classes + (predictions if name == PREDICTED else labels)
        table = torch.zeros(num_rows * num_classes, dtype=torch.float64, device=labels.device)
        tables[name] = table.index_add_(0, index, weight).view(num_rows, num_classes)
    return tables


def macro_f1(counts: Mapping[str, Tensor]) -> float | None:
    """Return the mean F1 of the classes that are labeled or predicted at least once; None if there are none.

    F1 = 2 * true positives / (predicted + labeled), as `sklearn.metrics.f1_score(average="macro")` computes it.

    Args:
        counts: "true_positives", "predicted" and "labeled", each [C].
    """
    total = counts[PREDICTED] + counts[LABELED]
    occurs = total > 0
    return float((2 * counts[TRUE_POSITIVES][occurs] / total[occurs]).mean()) if occurs.any() else None


def mean_iou(counts: Mapping[str, Tensor]) -> float | None:
    """Return the mean intersection over union of the classes that `macro_f1` counts; None if there are none.

    IoU = true positives / (predicted + labeled - true positives)
    """
    union = counts[PREDICTED] + counts[LABELED] - counts[TRUE_POSITIVES]
    occurs = union > 0
    return float((counts[TRUE_POSITIVES][occurs] / union[occurs]).mean()) if occurs.any() else None


def micro_f1(true_positives: float, predicted: float, labeled: float) -> float | None:
    """Return F1 of numbers of labels, summed over all rows and labels; None if none is given or predicted."""
    total = predicted + labeled
    return 2 * true_positives / total if total else None


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Return the correlation of two series [N]; None if one is constant or not finite, or has fewer than 2 values."""
    if len(x) < 2 or _is_constant(x) or _is_constant(y):
        return None
    x, y = (series.double() - series.double().mean() for series in (x, y))
    value = float((x / x.norm()) @ (y / y.norm()))
    return max(-1.0, min(1.0, value)) if math.isfinite(value) else None


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Return the correlation of the ranks of two series [N], with the mean rank for equal values; see `pearson`."""
    if not (x.isfinite().all() and y.isfinite().all()):
        return None
    return pearson(_ranks(x), _ranks(y))


def _is_constant(series: Tensor) -> bool:
    return bool((series == series[0]).all())


def _ranks(series: Tensor) -> Tensor:
    """Return the ranks of the values, [N]; equal values share their mean rank."""
    _, group, sizes = series.unique(return_inverse=True, return_counts=True)
    last_ranks = sizes.cumsum(0).double()
    return (last_ranks - (sizes.double() - 1) / 2)[group]
