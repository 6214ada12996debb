"""A collator that adds the rows of teachers with other tokenizers to the batches of another collator."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...errors import DistillError
from .teacher_rows import TeacherRowMaker


class AlignedCollator:
    """A collator that adds the teacher's rows and the chunks of both sides to the batches of another collator.

    Args:
        collator: any collator of batches with `input_ids` and `labels`.
        makers: one for each teacher with another tokenizer.

    Raises:
        DistillError: two makers have the same name.
    """

    def __init__(self, collator: Callable[[list[Any]], dict[str, Any]], makers: Sequence[TeacherRowMaker]):
        names = [maker.name for maker in makers]
        if len(set(names)) != len(names):
            raise DistillError(
                f"The makers of teacher rows have the names {names}: give each teacher another name, because the keys "
                "of a batch end in it."
            )
        self.collator, self.makers = collator, tuple(makers)

    def __getattr__(self, name: str) -> Any:
        if name in ("collator", "makers"):  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.collator, name)

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the batch of the other collator with the keys of each teacher, see `AlignedKeys`."""
        batch = dict(self.collator(list(rows)))
        columns_by_maker = [maker(batch) for maker in self.makers]
        for maker, columns in zip(self.makers, columns_by_maker, strict=True):
            for key in maker.replaced_keys:
                batch.pop(key, None)
            batch |= columns
        return batch
