"""`BatchPrefetcher`: takes batches from the data loader early, so that a teacher can start to answer them."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from ..core.targets import TEACHER_INDEX
from ..core.teacher_inputs import TEACHER_IDS, TEACHER_LABELS, TEACHER_MASK

ANNOUNCED_INPUTS = (
    *("input_ids", "attention_mask", "position_ids", "labels", "source"),
    *(TEACHER_INDEX, TEACHER_IDS, TEACHER_MASK, TEACHER_LABELS),
)


class BatchPrefetcher:
    """Keeps batches of an epoch that a teacher has started to answer; their order is that of the data loader."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget the batches of an earlier training."""
        self._source: Iterator[Any] | None = None
        self._batches: deque[Any] = deque()

    def take(self, source: Iterator[Any], count: int, num_ahead: int, start: Callable[[Any], None]) -> Iterator[Any]:
        """Return the next batches; fewer at the end of an epoch.

        Args:
            source: the batches of an epoch; batches of an earlier epoch are dropped.
            count: number of batches to return.
            num_ahead: number of further batches to take from the source.
            start: called with each batch when it is taken.
        """
        if source is not self._source:
            self._source, self._batches = source, deque()
        while len(self._batches) < count + num_ahead:
            try:
                batch = next(source)
            except StopIteration:
                break
            start(batch)
            self._batches.append(batch)
        return iter([self._batches.popleft() for _ in range(min(count, len(self._batches)))])
