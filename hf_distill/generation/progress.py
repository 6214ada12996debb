"""Progress of a generation: completions, tokens per second and the remaining time. Imports no torch."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

_REPORT_SECONDS = 0.5


@dataclass(frozen=True)
class GenerationProgress:
    """Progress of a generation.

    completions:       completions on the disk, with those of earlier processes
    total:             completions of the data set
    tokens_per_second: throughput since this process started
    seconds_left:      estimated remaining seconds at this throughput; None before the first completions
    """

    completions: int
    total: int
    tokens_per_second: float
    seconds_left: float | None


class ProgressMeter:
    """Counts tokens, also from several threads, and reports at most twice a second.

    Args:
        total: number of completions of the data set.
        done: number that is on the disk already.
        report: called with the progress.
        clock: returns seconds since any fixed time.
    """

    def __init__(
        self,
        total: int,
        done: int,
        report: Callable[[GenerationProgress], None],
        clock: Callable[[], float] = time.monotonic,
    ):
        self._total, self._before, self._done, self._report, self._clock = total, done, done, report, clock
        self._tokens = self._written_tokens = 0
        self._start = self._last = clock()
        self._lock = threading.Lock()

    def add_tokens(self, count: int) -> None:
        """Count generated tokens."""
        with self._lock:
            self._tokens += count
            if self._clock() - self._last >= _REPORT_SECONDS:
                self._send()

    def add_completions(self, count: int, tokens: int) -> None:
        """Count completions that are on the disk, and their tokens."""
        with self._lock:
            self._done += count
            self._written_tokens += tokens
            self._send()

    def _send(self) -> None:
        self._last = self._clock()
        tokens_per_second = self._tokens / max(self._last - self._start, 1e-9)
        num_written, seconds_left = self._done - self._before, None
        if num_written and tokens_per_second:
            mean_tokens = self._written_tokens / num_written
            unwritten_tokens = self._tokens - self._written_tokens
            remaining_tokens = (self._total - self._done) * mean_tokens - unwritten_tokens
            seconds_left = max(remaining_tokens, 0) / tokens_per_second
        self._report(GenerationProgress(self._done, self._total, tokens_per_second, seconds_left))
