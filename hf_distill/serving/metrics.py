"""Counters of a server, in the text format of Prometheus."""

import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping

_BUCKETS: Mapping[str, tuple[float, ...]] = {
    "rows": (1, 2, 4, 8, 16, 32, 64, 128),
    "seconds": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
}
_PREFIX = "hf_distill_serve_"


class Metrics:
    """Counters, histograms and gauges of a server; its methods may be called from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: dict[str, dict[str, float]] = {}
        self._histograms: dict[str, tuple[list[int], float]] = {}  # counts for each bucket and above, sum
        self._gauges: dict[str, Callable[[], float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        """Add to a counter; labels distinguish its parts."""
        text = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
        with self._lock:
            parts = self._counters.setdefault(name, {})
            parts[text] = parts.get(text, 0) + amount

    def observe(self, name: str, value: float) -> None:
        """Add a value to a histogram; its name ends in the unit, `_rows` or `_seconds`."""
        bounds = _BUCKETS[name.rpartition("_")[2]]
        with self._lock:
            counts, total = self._histograms.get(name, ([0] * (len(bounds) + 1), 0.0))
            counts[bisect_left(bounds, value)] += 1
            self._histograms[name] = counts, total + value

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """Add a value that is read when the metrics are."""
        self._gauges[name] = read

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the parts of a counter that have some labels."""
        parts = [f'{key}="{value}"' for key, value in labels.items()]
        with self._lock:
            counters = dict(self._counters.get(name, {}))
        return sum(value for text, value in counters.items() if {*parts} <= {*text.split(",")})

    def text(self) -> str:
        """Return all values in the text format of Prometheus, version 0.0.4."""
        lines: list[str] = []
        with self._lock:
            for name, parts in sorted(self._counters.items()):
                lines.append(f"# TYPE {_PREFIX}{name} counter")
                for labels, value in sorted(parts.items()):
                    lines.append(f"{_PREFIX}{name}{f'{{{labels}}}' if labels else ''} {value:g}")
            for name, (counts, total) in sorted(self._histograms.items()):
                lines += _histogram_lines(f"{_PREFIX}{name}", _BUCKETS[name.rpartition("_")[2]], counts, total)
        for name, read in sorted(self._gauges.items()):
            lines += [f"# TYPE {_PREFIX}{name} gauge", f"{_PREFIX}{name} {read():g}"]
        return "\n".join([*lines, ""])


def _histogram_lines(name: str, bounds: tuple[float, ...], counts: list[int], total: float) -> list[str]:
    lines, cumulative = [f"# TYPE {name} histogram"], 0
    for bound, count in zip([*map("{:g}".format, bounds), "+Inf"], counts, strict=True):
        cumulative += count
        lines.append(f'{name}_bucket{{le="{bound}"}} {cumulative}')
    return [*lines, f"{name}_sum {total:g}", f"{name}_count {cumulative}"]
