"""`Batcher`: runs the rows of several requests in one forward, in the order in which they arrived."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from transformers.utils import logging

from ..teachers.remote.api import RowTensors, TokenRow
from .metrics import Metrics

logger = logging.get_logger(__name__)
_MIN_RETRY_SECONDS, _MAX_RETRY_SECONDS = 1, 60


class QueueFull(Exception):
    """The queue has no room for a request.

    retry_after: seconds after which it may have
    """

    def __init__(self, retry_after: int):
        super().__init__(f"the queue of the server is full; try again in {retry_after} s")
        self.retry_after = retry_after


@dataclass(eq=False)
class _Request:
    """An accepted request.

    rows:   its rows
    result: the tensors of its rows, when all of them are computed
    """

    rows: Sequence[TokenRow]
    result: "Future[list[RowTensors]]" = field(default_factory=Future)
    computed: dict[int, RowTensors] = field(default_factory=dict)


class Batcher:
    """A queue of rows, and a thread that runs the model on as many of them as fit into a forward.

    While a forward runs, further requests wait, and the next forward takes their rows together. So requests are batched
    when there are many, and do not wait when there are few.

    Args:
        compute: the tensors of rows, which may request different layers; see `ServedTeacher.compute_rows`.
        max_batch_tokens: largest number of tokens of a forward, with padding.
        max_queued_tokens: largest number of tokens of the rows that wait.
        metrics: counts forwards and tokens.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[TokenRow]], list[RowTensors]],
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        metrics: Metrics,
    ):
        self._compute, self._metrics = compute, metrics
        self.max_batch_tokens, self.max_queued_tokens = max_batch_tokens, max_queued_tokens
        self._queue: deque[tuple[_Request, int]] = deque()  # rows that wait: request, index
        self._changed, self._is_closed = threading.Condition(), False
        self._queued_tokens, self._computing_rows, self._tokens_per_second = 0, 0, 0.0
        self._thread = threading.Thread(target=self._run, name="teacher", daemon=True)
        metrics.gauge("queued_rows", lambda: len(self._queue))
        metrics.gauge("queued_tokens", lambda: self._queued_tokens)
        metrics.gauge("computing_rows", lambda: self._computing_rows)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """Finish the accepted requests and end the thread."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()

    def submit(self, rows: Sequence[TokenRow]) -> "Future[list[RowTensors]]":
        """Add a request to the queue; cancelling its result removes it.

        Raises:
            QueueFull: it does not fit, or the server stops.
        """
        tokens = sum(len(row.ids) for row in rows)
        with self._changed:
            if self._is_closed or (self._queue and self._queued_tokens + tokens > self.max_queued_tokens):
                raise QueueFull(self._retry_after())
            request = _Request(rows)
            self._queue.extend((request, index) for index in range(len(rows)))
            self._queued_tokens += tokens
            self._changed.notify()
        return request.result

    def _retry_after(self) -> int:
        seconds = self._queued_tokens / self._tokens_per_second if self._tokens_per_second else _MIN_RETRY_SECONDS
        return min(max(round(seconds), _MIN_RETRY_SECONDS), _MAX_RETRY_SECONDS)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                batch = self._take()
                self._computing_rows = len(batch)
                if not batch and self._is_closed:
                    return
            if batch:
                self._run_batch(batch)

    def _take(self) -> list[tuple[_Request, int]]:
        """Remove rows from the front of the queue that fit into a forward together; skip those of ended requests."""
        batch, longest = list[tuple[_Request, int]](), 0
        while self._queue:
            request, index = self._queue[0]
            length = len(request.rows[index].ids)
            is_ended = request.result.done()
            if not is_ended and batch and (len(batch) + 1) * max(longest, length) > self.max_batch_tokens:
                break
            self._queue.popleft()
            self._queued_tokens -= length
            if not is_ended:
                batch.append((request, index))
                longest = max(longest, length)
        return batch

    def _run_batch(self, batch: Sequence[tuple[_Request, int]]) -> None:
        rows, start = [request.rows[index] for request, index in batch], time.monotonic()
        try:
            computed = self._compute_rows(rows)
        except Exception as error:
            logger.exception(f"The forward of {len(rows)} rows failed")
            self._metrics.count("failed_batches_total")
            for request, _ in batch:
                _end(request, error)
            return
        finally:
            self._computing_rows = 0
        seconds, tokens = time.monotonic() - start, sum(len(row.ids) for row in rows)
        rate = tokens / max(seconds, 1e-6)
        self._tokens_per_second = 0.8 * self._tokens_per_second + 0.2 * rate if self._tokens_per_second else rate
        self._metrics.observe("batch_rows", len(rows))
        self._metrics.observe("batch_seconds", seconds)
        self._metrics.count("tokens_total", tokens)
        self._metrics.count("target_tokens_total", sum(len(row.positions) for row in rows))
        for (request, index), tensors in zip(batch, computed, strict=True):
            request.computed[index] = tensors
            if len(request.computed) == len(request.rows):
                _end(request)

    def _compute_rows(self, rows: Sequence[TokenRow]) -> list[RowTensors]:
        """Return the tensors of rows; if they need too much memory together, of one half after the other."""
        try:
            return self._compute(rows)
        except torch.OutOfMemoryError:
            if len(rows) == 1:
                raise
            logger.warning(
                f"A forward of {len(rows)} rows needed more memory than the device has, and was split. Lower "
                "--max-batch-tokens."
            )
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
        half = len(rows) // 2
        return [*self._compute_rows(rows[:half]), *self._compute_rows(rows[half:])]


def _end(request: _Request, error: Exception | None = None) -> None:
    """Set the result of a request, unless it was cancelled or has ended."""
    if request.result.done() or not request.result.set_running_or_notify_cancel():
        return
    if error is None:
        request.result.set_result([request.computed[index] for index in range(len(request.rows))])
    else:
        request.result.set_exception(error)
