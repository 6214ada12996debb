"""Plots of logs and analysis results; each function returns a matplotlib figure, or None without data."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np

from ..analysis.curve import Curve
from ..analysis.evaluation import Retention
from ..analysis.inspector import Inspection
from ..analysis.successive_halving import Candidate
from ..analysis.temperature_search import SearchResult
from ..core.results import Metrics
from ..generation.evaluation import GENERATED, KEPT, Histogram
from .figures import COLORS, TEXT_COLOR, axes, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def losses(logs: Sequence[Metrics]) -> "Figure | None":
    """Plot every term of the objective, as `T^2 * loss`, over the steps.

    Args:
        logs: lines of metrics.jsonl of one training.
    """
    training = [log for log in logs if "loss" in log]
    names = _unique(name for log in training for name in log if name.endswith("_loss"))
    if not training or not names:
        return None
    figure, (subplot,) = axes("Terms of the objective", "step", "nats/token")
    _line(subplot, training, "loss", "total", COLORS["student"], 2.2)
    for name in names:
        term = name.removesuffix("_loss")
        _line(subplot, training, name, term, COLORS.get(term), 1.3)
    legend(subplot)
    return figure


def closeness(logs: Mapping[str, Sequence[Metrics]]) -> "Figure | None":
    """Plot KL to the teacher at T = 1 and top-1 agreement: lines for training, points for the held-out rows.

    Args:
        logs: name of a training ("student", "control") -> its lines.
    """
    logged = {key for lines in logs.values() for log in lines for key in log}
    of_chunks = "" if not logged.isdisjoint(("kl", "eval_kl")) else "chunk_"  # the teacher has another tokenizer
    if logged.isdisjoint((f"{of_chunks}kl", f"eval_{of_chunks}kl")):
        return None
    unit = "chunk" if of_chunks else "token"
    figure, (left, right) = axes("KL to the teacher and top-1 agreement", "step", f"KL, nats/{unit}", 8.4, 3.2, 2)
    right.set_ylabel("top-1 agreement")
    for name, lines in logs.items():
        for subplot, key in ((left, f"{of_chunks}kl"), (right, f"{of_chunks}agreement")):
            _line(subplot, lines, key, f"{name}, training", COLORS.get(name), 1, 0.7)
            evaluations = [log for log in lines if f"eval_{key}" in log]
            subplot.plot(
                [log["step"] for log in evaluations],
                [log[f"eval_{key}"] for log in evaluations],
                "o",
                color=COLORS.get(name),
                label=f"{name}, held-out rows",
            )
    legend(left)
    return figure


def sources(logs: Sequence[Metrics]) -> "Figure | None":
    """Plot soft and hard losses of each source of a mixture, over the steps."""
    training = [log for log in logs if "loss" in log]
    names = _unique(name for log in training for name in log if "_loss_" in name)
    if not names:
        return None
    figure, (left, right) = axes("Losses of each source", "step", "hard loss, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("soft loss, nats/token")
    for name in names:
        term, _, source = name.partition("_loss_")
        _line(left if term == "hard" else right, training, name, source)
    legend(left)
    return figure


def entropies(logs: Sequence[Metrics]) -> "Figure | None":
    """Plot the entropy of both models at T = 1, over the steps."""
    training = [log for log in logs if "student_entropy" in log and "teacher_entropy" in log]
    if not training:
        return None
    figure, (subplot,) = axes("Entropy at T = 1", "step", "nats/token")
    for model in ("teacher", "student"):
        _line(subplot, training, f"{model}_entropy", model, COLORS[model])
    legend(subplot)
    return figure


def token_lengths(lengths: Histogram, titles: Mapping[str, str]) -> "Figure":
    """Plot numbers of completions by their length.

    Args:
        lengths: the histogram.
        titles: titles of its parts.
    """
    figure, (subplot,) = axes("Length of the completions", "generated tokens", "completions")
    for name, color in ((GENERATED, COLORS["before"]), (KEPT, COLORS["teacher"])):
        if name in lengths.counts:
            subplot.stairs(lengths.counts[name], lengths.edges, fill=True, alpha=0.6, color=color, label=titles[name])
    if len(lengths.counts) > 1:
        legend(subplot)
    return figure


def _line(
    subplot: "Axes",
    logs: Sequence[Metrics],
    name: str,
    label: str,
    color: str | None = None,
    width: float | None = None,
    alpha: float | None = None,
) -> None:
    points = [(log["step"], log[name]) for log in logs if name in log]
    if points:
        subplot.plot(*zip(*points, strict=True), label=label, color=color, lw=width, alpha=alpha)


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def entropy_histogram(inspection: Inspection) -> "Figure":
    """Plot the histogram of the teacher's entropy over held-out tokens; see `Inspection.histogram`."""
    figure, (subplot,) = axes("Entropy of the teacher at T = 1", "entropy, nats", "tokens")
    lows = [low for low, _ in inspection.histogram]
    widths = [high - low for low, high in zip(lows, [*lows[1:], lows[-1] + 1], strict=True)]
    counts = [count for _, count in inspection.histogram]
    subplot.bar(lows, counts, widths, align="edge", color=COLORS["teacher"], alpha=0.8)
    return figure


def effect_of_temperature(inspection: Inspection) -> "Figure":
    """Plot entropy and mass of the likeliest ids over T; see `Inspection.by_temperature`."""
    figure, (left, right) = axes("Effect of T on the teacher's probabilities", "T", "entropy, nats", 8.4, 3.2, 2)
    right.set_ylabel("share of the mass")
    effects = inspection.by_temperature
    left.plot([e.temperature for e in effects], [e.entropy for e in effects], "o-", color=COLORS["teacher"])
    for k in effects[0].mass:
        right.plot([e.temperature for e in effects], [e.mass[k] for e in effects], "o-", label=f"top {k}")
    for subplot in (left, right):
        subplot.set_xscale("log")
        _ticks(subplot, {e.temperature for e in effects})
    legend(right)
    return figure


def search(result: SearchResult) -> "Figure":
    """Plot held-out NLL and KL of each candidate over its steps, and the criterion over T; see `find_temperature`.

    Each T has a color, and each alpha a line style.
    """
    figure, panels = axes("Temperature and alpha", "step", "NLL of the labels, nats/token", 11, 3.6, 3)
    panels[1].set_ylabel("KL to the teacher at T = 1, nats/token")
    candidates = sorted(result.candidates, key=lambda c: (c.alpha, c.temperature))
    colors = dict(zip(sorted({c.temperature for c in candidates}), cycle(COLORS.values()), strict=False))
    lines = dict(zip(sorted({c.alpha for c in candidates}), cycle(("o-", "s--", "^:", "D-.")), strict=False))
    for candidate in candidates:
        t, alpha = candidate.temperature, candidate.alpha
        steps = [rung.step for rung in candidate.rungs]
        metrics: list[list[float | None]] = [[r.nll for r in candidate.rungs], [r.kl for r in candidate.rungs]]
        for subplot, values in zip(panels, metrics, strict=False):
            if None not in values:
                style, label = lines[alpha], f"T {t:g}, alpha {alpha:g}"
                subplot.plot(steps, np.array(values, float), style, color=colors[t], lw=1.3, ms=4, label=label)
    for subplot in panels[:2]:
        subplot.set_xscale("log", base=2)
        _ticks(subplot, {rung.step for c in candidates for rung in c.rungs})
    legend(panels[0], fontsize="small")
    _criterion_over_temperature(panels[2], candidates, result.by, lines)
    return figure


def _criterion_over_temperature(
    subplot: "Axes", candidates: Sequence[Candidate], by: str, lines: Mapping[float, str]
) -> None:
    """Plot the criterion over T at the first rung, the only one that all candidates have."""
    for alpha, line in lines.items():
        with_alpha = [c for c in candidates if c.alpha == alpha]
        values = np.array([c.rungs[0].nll if by == "nll" else c.rungs[0].kl for c in with_alpha], float)
        subplot.plot(
            [c.temperature for c in with_alpha], values, line, color=COLORS["before"], ms=4, label=f"alpha {alpha:g}"
        )
    subplot.set_xscale("log")
    subplot.set_xlabel("T")
    subplot.set_ylabel(f"{by.upper()} at step {candidates[0].rungs[0].step}")
    _ticks(subplot, {c.temperature for c in candidates})
    legend(subplot, fontsize="small")


def _ticks(subplot: "Axes", values: Collection[float]) -> None:
    """Set one tick for each value, and no others."""
    subplot.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    subplot.minorticks_off()


def relative_scores(retention: Retention) -> "Figure | None":
    """Plot each model's percent of the teacher's score on each task, with intervals; see `Retention`."""
    tasks = [task for task in retention.tasks if any(task.relative_scores.values())]
    if not tasks:
        return None
    models = [name for name in tasks[0].relative_scores if any(task.relative_scores.get(name) for task in tasks)]
    figure, (subplot,) = axes("Scores relative to the teacher", "", "% of the teacher's score", 8.4, 3.6)
    width = 0.8 / len(models)
    for i, name in enumerate(models):
        scores = [(at, score) for at, task in enumerate(tasks) if (score := task.relative_scores.get(name))]
        positions = [at + (i - (len(models) - 1) / 2) * width for at, _ in scores]
        heights = [score.percent for _, score in scores]
        intervals = [
            [max(score.percent - score.low, 0) for _, score in scores],
            [max(score.high - score.percent, 0) for _, score in scores],
        ]
        color = COLORS.get(name)
        subplot.bar(
            positions, heights, width * 0.9, yerr=intervals, color=color, ecolor=TEXT_COLOR, capsize=3, label=name
        )
    subplot.axhline(100, lw=1, color=COLORS["teacher"])
    subplot.set_xticks(range(len(tasks)), [task.task.removeprefix("mini_") for task in tasks])
    subplot.grid(axis="x", visible=False)
    legend(subplot)
    return figure


def curve(result: Curve) -> "Figure":
    """Plot held-out NLL and KL over tokens; see `data_curve`."""
    figure, (left, right) = axes("Quality over tokens", "tokens", "NLL of the labels, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("KL to the teacher, nats/token")
    tokens = [point.tokens for point in result.points]
    left.plot(tokens, [point.nll for point in result.points], "o-", color=COLORS["student"])
    kl_points = [(point.tokens, point.kl) for point in result.points if point.kl is not None]
    if kl_points:
        right.plot(*zip(*kl_points, strict=True), "o-", color=COLORS["student"])
    return figure
