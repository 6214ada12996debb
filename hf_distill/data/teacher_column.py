"""The column `teacher` of a data set: the name of the teacher of each row."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from datasets import Dataset, IterableDataset, Value

from ..core.targets import TEACHER_INDEX
from ..errors import DistillError, did_you_mean

PROBED_ROWS = 100  # of a stream, in which the column is read
NO_TEACHER = -1  # index of the teacher of a row without one
COLUMN = "teacher"


def check_no_teacher_column(rows: Any, names: Sequence[str], where: str, remedy: str) -> None:
    """Refuse data whose column `teacher` names teachers each of which teaches every row.

    Args:
        rows: a data set or a list of rows; of a stream the first rows are read.
        names: names of the teachers.
        where: name of the data in the error.
        remedy: how rows are routed to teachers.

    Raises:
        DistillError: a row names one of the teachers.
    """
    columns = getattr(rows, "column_names", None)
    if columns is not None and COLUMN not in columns:
        return
    if isinstance(rows, Dataset):
        present_names: Iterable[Any] = rows.unique(COLUMN) if isinstance(rows.features[COLUMN], Value) else ()
    elif isinstance(rows, IterableDataset | list):
        present_names = [row.get(COLUMN) for row in islice(rows, PROBED_ROWS) if isinstance(row, Mapping)]
    else:
        return
    named = [name for name in names if name in present_names]
    if named:
        raise DistillError(
            f"{where} has the column `{COLUMN}` with the names of teachers ({', '.join(named)}), but each of these "
            f"teachers teaches all rows: {remedy}, or remove the column."
        )


def check_teacher_column(datasets: Mapping[str, Any], names: Sequence[str]) -> None:
    """Check before training that all data sets have the column `teacher`, or none, and the names in it.

    Names of streams and lists are checked when their rows are collated.

    Raises:
        DistillError: only some have the column, or a row names none of the teachers.
    """
    columns = {name: getattr(rows, "column_names", None) for name, rows in datasets.items()}
    known = {name: COLUMN in each for name, each in columns.items() if isinstance(each, list)}
    if len({*known.values()}) > 1:
        raise DistillError(
            f"{', '.join(name for name in known if not known[name])} has no column `{COLUMN}`, which "
            f"{', '.join(name for name in known if known[name])} has: each row needs the name of its teacher, in "
            "evaluation too. Add the column to all data sets."
        )
    for name, rows in datasets.items():
        if isinstance(rows, Dataset) and COLUMN in rows.column_names and isinstance(rows.features[COLUMN], Value):
            for each in rows.unique(COLUMN):
                _index_of(each, names, name)


def _index_of(name: object, names: Sequence[str], where: str) -> int:
    if name in (None, ""):
        return NO_TEACHER
    if name not in names:
        raise DistillError(
            f'The column `{COLUMN}` of {where} holds the name of each row\'s teacher, or "" for none. A row has the '
            f"teacher {name!r}, which is none of the teachers{did_you_mean(str(name), names)}"
        )
    return names.index(str(name))


class TeacherColumnCollator:
    """A collator that replaces the column `teacher`, names, by `teacher_index` [B], indices; -1 for "" or None.

    Args:
        collator: the collator of the other columns, which must return one batch row for each row.
        names: names of the teachers, by index.
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], names: Sequence[str]):
        self.collator, self.names = collator, tuple(names)

    def __getattr__(self, name: str) -> Any:
        if name in ("collator", "names"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other columns with `teacher_index`.

        Raises:
            DistillError: a row names no teacher of the trainer; or the collator packs rows.
        """
        has_names = [COLUMN in row for row in rows]
        batch = self.collator([{key: value for key, value in row.items() if key != COLUMN} for row in rows])
        if not any(has_names):
            return batch
        index = torch.tensor([_index_of(row.get(COLUMN), self.names, "the data") for row in rows])
        num_rows = {len(value) for key, value in batch.items() if key in ("input_ids", "labels")}
        if num_rows != {len(rows)}:
            raise DistillError(
                f"The collator made {sorted(num_rows)} batch rows of {len(rows)} rows with a column `teacher`: it "
                "packs them. Turn packing off, or route a mixture by its sources, which works with packed rows."
            )
        return batch | {TEACHER_INDEX: index}
