"""The column `teacher` of a data set: the name of the teacher of each row."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from ..core.targets import TEACHER_INDEX
from ..errors import DistillError, did_you_mean

NO_TEACHER = -1  # index of the teacher of a row without one
COLUMN = "teacher"


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
        index = torch.tensor([self._index_of(row.get(COLUMN)) for row in rows])
        num_rows = {len(value) for key, value in batch.items() if key in ("input_ids", "labels")}
        if num_rows != {len(rows)}:
            raise DistillError(
                f"The collator made {sorted(num_rows)} batch rows of {len(rows)} rows with a column `teacher`: it "
                "packs them. Turn packing off, or route a mixture by its sources, which works with packed rows."
            )
        return batch | {TEACHER_INDEX: index}

    def _index_of(self, name: object) -> int:
        if name in (None, ""):
            return NO_TEACHER
        if name not in self.names:
            raise DistillError(
                f"A row has the teacher {name!r}, which is none of the teachers{did_you_mean(str(name), self.names)}. "
                'Use "" for a row without a teacher.'
            )
        return self.names.index(str(name))
