"""Plots of logs and analysis results; each function returns a matplotlib figure, or None without data."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from .figures import COLORS, TEXT_COLOR, axes, legend

Log = Mapping[str, Any]


def losses(logs: Sequence[Log]) -> Any:
    """Plot every term of the objective, as `T^2 * loss`, over the steps.

    Args:
        logs: lines of metrics.jsonl of one training.
    """
    training = [log for log in logs if "loss" in log]
    names = _unique(name for log in training for name in log if name.endswith("_loss"))
    if not training or not names:
        return None
    figure, subplot = axes("Terms of the objective", "step", "nats/token")
    for name in ["loss", *names]:
        term = name.removesuffix("_loss")
        style: dict[str, Any] = {"lw": 2.2, "color": COLORS["student"]} if name == "loss" else {"lw": 1.3}
        if term in COLORS:
            style["color"] = COLORS[term]
        _line(subplot, training, name, "total" if name == "loss" else term, **style)
    legend(subplot)
    return figure


def closeness(logs: Mapping[str, Sequence[Log]]) -> Any:
    """Plot KL to the teacher at T = 1 and top-1 agreement: lines for training, points for the held-out rows.

    Args:
        logs: name of a training ("student", "control") -> its lines.
    """
    if not any("kl" in log or "eval_kl" in log for lines in logs.values() for log in lines):
        return None
    figure, (left, right) = axes("KL to the teacher and top-1 agreement", "step", "KL, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("top-1 agreement")
    for name, lines in logs.items():
        for subplot, key in ((left, "kl"), (right, "agreement")):
            _line(subplot, lines, key, f"{name}, training", color=COLORS.get(name), lw=1, alpha=0.7)
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


def sources(logs: Sequence[Log]) -> Any:
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


def entropies(logs: Sequence[Log]) -> Any:
    """Plot the entropy of both models at T = 1, over the steps."""
    training = [log for log in logs if "student_entropy" in log and "teacher_entropy" in log]
    if not training:
        return None
    figure, subplot = axes("Entropy at T = 1", "step", "nats/token")
    for model in ("teacher", "student"):
        _line(subplot, training, f"{model}_entropy", model, color=COLORS[model])
    legend(subplot)
    return figure


def _line(subplot: Any, logs: Sequence[Log], name: str, label: str, **style) -> None:
    points = [(log["step"], log[name]) for log in logs if name in log]
    if points:
        subplot.plot(*zip(*points, strict=True), label=label, **style)


def _unique(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def entropy_histogram(inspection: Mapping[str, Any]) -> Any:
    """Plot the histogram of the teacher's entropy over held-out tokens; see `Inspection.histogram`."""
    figure, subplot = axes("Entropy of the teacher at T = 1", "entropy, nats", "tokens")
    lows = [low for low, _ in inspection["histogram"]]
    widths = [high - low for low, high in zip(lows, [*lows[1:], lows[-1] + 1], strict=True)]
    counts = [count for _, count in inspection["histogram"]]
    subplot.bar(lows, counts, widths, align="edge", color=COLORS["teacher"], alpha=0.8)
    return figure


def effect_of_temperature(inspection: Mapping[str, Any]) -> Any:
    """Plot entropy and mass of the likeliest ids over T; see `Inspection.by_temperature`."""
    figure, (left, right) = axes("Effect of T on the teacher's probabilities", "T", "entropy, nats", 8.4, 3.2, 2)
    right.set_ylabel("share of the mass")
    effects = inspection["by_temperature"]
    left.plot([e["temperature"] for e in effects], [e["entropy"] for e in effects], "o-", color=COLORS["teacher"])
    for k in effects[0]["mass"]:
        right.plot([e["temperature"] for e in effects], [e["mass"][k] for e in effects], "o-", label=f"top {k}")
    for subplot in (left, right):
        subplot.set_xscale("log")
        _ticks(subplot, {e["temperature"] for e in effects})
    legend(right)
    return figure


def search(result: Mapping[str, Any]) -> Any:
    """Plot held-out NLL and KL of each candidate over its steps, and the criterion over T; see `find_temperature`.

    Each T has a color, and each alpha a line style.
    """
    figure, panels = axes("Temperature and alpha", "step", "NLL of the labels, nats/token", 11, 3.6, 3)
    panels[1].set_ylabel("KL to the teacher at T = 1, nats/token")
    candidates = sorted(result["candidates"], key=lambda c: (c["alpha"], c["temperature"]))
    colors = dict(zip(sorted({c["temperature"] for c in candidates}), cycle(COLORS.values()), strict=False))
    lines = dict(zip(sorted({c["alpha"] for c in candidates}), cycle(("o-", "s--", "^:", "D-.")), strict=False))
    for candidate in candidates:
        t, alpha = candidate["temperature"], candidate["alpha"]
        steps = [rung["step"] for rung in candidate["rungs"]]
        for subplot, key in zip(panels, ("nll", "kl"), strict=False):
            values = [rung[key] for rung in candidate["rungs"]]
            if None not in values:
                subplot.plot(
                    steps, values, lines[alpha], color=colors[t], lw=1.3, ms=4, label=f"T {t:g}, alpha {alpha:g}"
                )
    for subplot in panels[:2]:
        subplot.set_xscale("log", base=2)
        _ticks(subplot, {rung["step"] for c in candidates for rung in c["rungs"]})
    legend(panels[0], fontsize="small")
    _criterion_over_temperature(panels[2], candidates, result["by"], lines)
    return figure


def _criterion_over_temperature(
    subplot: Any, candidates: Sequence[Mapping[str, Any]], by: str, lines: Mapping[float, str]
) -> None:
    """Plot the criterion over T at the first rung, the only one that all candidates have."""
    for alpha, line in lines.items():
        with_alpha = [c for c in candidates if c["alpha"] == alpha]
        values = [c["rungs"][0][by] for c in with_alpha]
        subplot.plot(
            [c["temperature"] for c in with_alpha], values, line, color=COLORS["before"], ms=4, label=f"alpha {alpha:g}"
        )
    subplot.set_xscale("log")
    subplot.set_xlabel("T")
    subplot.set_ylabel(f"{by.upper()} at step {candidates[0]['rungs'][0]['step']}")
    _ticks(subplot, {c["temperature"] for c in candidates})
    legend(subplot, fontsize="small")


def _ticks(subplot: Any, values: Any) -> None:
    """Set one tick for each value, and no others."""
    subplot.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    subplot.minorticks_off()


def relative_scores(retention: Mapping[str, Any]) -> Any:
    """Plot each model's percent of the teacher's score on each task, with intervals; see `Retention`."""
    tasks = [task for task in retention["tasks"] if any(task["kept"].values())]
    if not tasks:
        return None
    models = [name for name in tasks[0]["kept"] if any(task["kept"].get(name) for task in tasks)]
    figure, subplot = axes("Scores relative to the teacher", "", "% of the teacher's score", 8.4, 3.6)
    width = 0.8 / len(models)
    for i, name in enumerate(models):
        scores = [(at, task["kept"][name]) for at, task in enumerate(tasks) if task["kept"].get(name)]
        positions = [at + (i - (len(models) - 1) / 2) * width for at, _ in scores]
        heights = [score["percent"] for _, score in scores]
        intervals = [
            [max(score["percent"] - score["low"], 0) for _, score in scores],
            [max(score["high"] - score["percent"], 0) for _, score in scores],
        ]
        style = {"color": COLORS.get(name), "ecolor": TEXT_COLOR, "capsize": 3, "label": name}
        subplot.bar(positions, heights, width * 0.9, yerr=intervals, **style)
    subplot.axhline(100, lw=1, color=COLORS["teacher"])
    subplot.set_xticks(range(len(tasks)), [task["task"].removeprefix("mini_") for task in tasks])
    subplot.grid(axis="x", visible=False)
    legend(subplot)
    return figure


def curve(result: Mapping[str, Any]) -> Any:
    """Plot held-out NLL and KL over tokens; see `data_curve`."""
    figure, (left, right) = axes("Quality over tokens", "tokens", "NLL of the labels, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("KL to the teacher, nats/token")
    tokens = [point["tokens"] for point in result["points"]]
    left.plot(tokens, [point["nll"] for point in result["points"]], "o-", color=COLORS["student"])
    kl_points = [(point["tokens"], point["kl"]) for point in result["points"] if point["kl"] is not None]
    if kl_points:
        right.plot(*zip(*kl_points, strict=True), "o-", color=COLORS["student"])
    return figure
