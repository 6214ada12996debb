"""The columns `weight` and `origin` of rows in batches."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..core.row_values import ORIGIN, WEIGHT, check_weight, origin_index
from ..errors import DistillError

_DTYPES: dict[str, tuple[Callable[[object], float], torch.dtype]] = {
    WEIGHT: (check_weight, torch.float32),
    ORIGIN: (origin_index, torch.long),
}


def collate_row_values(rows: Sequence[Mapping[str, Any]], is_packed: bool = False) -> dict[str, Tensor]:
    """Return `weight` and `origin` of rows that have these columns, [B].

    Args:
        rows: rows whose columns `weight` and `origin` hold one value, or with `is_packed` one value or one for each
            token.
        is_packed: whether the rows are joined to one, so that the values are [1, S].

    Raises:
        DistillError: a value is invalid, or only some rows have it.
    """
    batch = {}
    for column, (check, dtype) in _DTYPES.items():
        if not any(column in row for row in rows):
            continue
        values = [row.get(column) for row in rows]
        if is_packed:
            of_tokens = [
                value if isinstance(value, list) else [value] * len(row["input_ids"])
                for row, value in zip(rows, values, strict=True)
            ]
            values = [value for part in of_tokens for value in part]
        values = [value.item() if isinstance(value, Tensor) and value.dim() == 0 else value for value in values]
        tensor = torch.tensor([check(value) for value in values], dtype=dtype)
        batch[column] = tensor[None] if is_packed else tensor
    return batch


class RowValuesCollator:
    """A collator that adds `weight` and `origin` to the batches of another collator, which may not know these columns.

    Args:
        collator: the collator of the other columns. It returns a batch row for each row, or joins all rows to one.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]]):
        self.collator = collator

    def __getattr__(self, name: str) -> Any:
        if name == "collator":  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other columns with `weight` and `origin`.

        Raises:
            DistillError: a value is invalid; or the collator makes another number of rows or tokens.
        """
        batch = self.collator([{key: value for key, value in row.items() if key not in _DTYPES} for row in rows])
        shape = batch["labels"].shape if "labels" in batch else ()
        num_tokens = sum(len(row.get("input_ids", ())) for row in rows)
        is_packed = len(shape) == 2 and shape == (1, num_tokens) and (len(rows) > 1 or "seq_lengths" in rows[0])
        if not is_packed and shape[:1] != (len(rows),):
            raise DistillError(
                f"The collator made labels of shape {tuple(shape)} of {len(rows)} rows with a column "
                f"{' or '.join(_DTYPES)}, so the values cannot be given to their tokens: let the collator return "
                "`weight` and `origin`, use hf_distill.data.Collator, or remove the columns."
            )
        return batch | collate_row_values(rows, is_packed)


def has_row_value(column: str, *datasets: Any) -> bool:
    """Return whether one of several objects is a data set, or a list of rows, with a column; its first row tells it."""
    for rows in datasets:
        if isinstance(rows, Dataset | IterableDataset) and rows.column_names is not None:
            names: Any = rows.column_names
        else:
            names = rows[0] if isinstance(rows, list | Dataset) and len(rows) else ()
        if isinstance(names, Mapping | list) and column in names:
            return True
    return False


def check_no_weights(inputs: Mapping[str, Any], is_training: bool) -> None:
    """Check that a batch for the loss of the Trainer has no weights, which it does not read.

    Raises:
        DistillError: a batch of the training has some.
    """
    if is_training and WEIGHT in inputs:
        raise DistillError(
            f"The batch has `{WEIGHT}`, and the trainer has no teacher, so it trains with the loss of the Trainer, "
            "which reads no weights: pass `teacher=hf_distill.teachers.NullTeacher()` and set alpha to 0 to train on "
            f"weighted labels, or remove `{WEIGHT}`."
        )
