"""Plots of what a run logged and of what was found out about it: matplotlib figures, None where there is nothing."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from .figures import COLOURS, INK, axes, legend

Log = Mapping[str, Any]


def losses(logs: Sequence[Log]) -> Any:
    """Every term of the objective, as `scale * loss`, over the steps.

    Args:
        logs: lines of metrics.jsonl of one training.
    """
    training = [log for log in logs if "loss" in log]
    names = _in_order(name for log in training for name in log if name.endswith("_loss"))
    if not training or not names:
        return None
    figure, on = axes("Terms of the objective", "step", "nats/token")
    for name in ["loss", *names]:
        term = name.removesuffix("_loss")
        style: dict[str, Any] = {"lw": 2.2, "color": COLOURS["student"]} if name == "loss" else {"lw": 1.3}
        if term in COLOURS:
            style["color"] = COLOURS[term]
        _line(on, training, name, "all of it" if name == "loss" else term, **style)
    legend(on)
    return figure


def closeness(logs: Mapping[str, Sequence[Log]]) -> Any:
    """KL to the teacher at T = 1 and top-1 agreement: lines in training, points on the held-out rows.

    Args:
        logs: name of a training ("student", "control") -> its lines.
    """
    if not any("kl" in log or "eval_kl" in log for lines in logs.values() for log in lines):
        return None
    figure, (left, right) = axes("How close the student is to its teacher", "step", "KL, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("top-1 agreement")
    for name, lines in logs.items():
        for on, key in ((left, "kl"), (right, "agreement")):
            _line(on, lines, key, f"{name}, in training", color=COLOURS.get(name), lw=1, alpha=0.7)
            held = [log for log in lines if f"eval_{key}" in log]
            on.plot(
                [log["step"] for log in held],
                [log[f"eval_{key}"] for log in held],
                "o",
                color=COLOURS.get(name),
                label=f"{name}, held out",
            )
    legend(left)
    return figure


def sources(logs: Sequence[Log]) -> Any:
    """Soft and hard losses of each source of a mixture, over the steps."""
    training = [log for log in logs if "loss" in log]
    found = _in_order(name for log in training for name in log if "_loss_" in name)
    if not found:
        return None
    figure, (left, right) = axes("Losses of each source", "step", "hard, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("soft, nats/token")
    for name in found:
        term, _, source = name.partition("_loss_")
        _line(left if term == "hard" else right, training, name, source)
    legend(left)
    return figure


def entropies(logs: Sequence[Log]) -> Any:
    """Entropy of both models at T = 1, over the steps."""
    training = [log for log in logs if "student_entropy" in log and "teacher_entropy" in log]
    if not training:
        return None
    figure, on = axes("Entropy at T = 1", "step", "nats/token")
    for model in ("teacher", "student"):
        _line(on, training, f"{model}_entropy", model, color=COLOURS[model])
    legend(on)
    return figure


def _line(on: Any, logs: Sequence[Log], name: str, label: str, **style) -> None:
    found = [(log["step"], log[name]) for log in logs if name in log]
    if found:
        on.plot(*zip(*found, strict=True), label=label, **style)


def _in_order(names: Any) -> list[str]:
    return list(dict.fromkeys(names))


def entropy_histogram(inspection: Mapping[str, Any]) -> Any:
    """How many held-out tokens the teacher is how unsure of; see `Inspection.histogram`."""
    figure, on = axes("Entropy of the teacher at T = 1", "nats", "tokens")
    lows = [low for low, _ in inspection["histogram"]]
    widths = [high - low for low, high in zip(lows, [*lows[1:], lows[-1] + 1], strict=True)]
    counts = [count for _, count in inspection["histogram"]]
    on.bar(lows, counts, widths, align="edge", color=COLOURS["teacher"], alpha=0.8)
    return figure


def effect_of_t(inspection: Mapping[str, Any]) -> Any:
    """Entropy and mass of the likeliest ids over T; see `Inspection.by_temperature`."""
    figure, (left, right) = axes("What T does to the teacher", "T", "entropy, nats", 8.4, 3.2, 2)
    right.set_ylabel("share of the mass")
    at = inspection["by_temperature"]
    left.plot([a["temperature"] for a in at], [a["entropy"] for a in at], "o-", color=COLOURS["teacher"])
    for k in at[0]["mass"]:
        right.plot([a["temperature"] for a in at], [a["mass"][k] for a in at], "o-", label=f"likeliest {k}")
    for on in (left, right):
        on.set_xscale("log")
        _ticks(on, {a["temperature"] for a in at})
    legend(right)
    return figure


def search(found: Mapping[str, Any]) -> Any:
    """Held-out NLL and KL of each candidate over its steps, and over T where all were measured; see `find_temperature`.

    A colour for each T, a kind of line for each alpha.
    """
    figure, panels = axes("Temperature and alpha", "step", "NLL of the labels, nats/token", 11, 3.6, 3)
    panels[1].set_ylabel("KL to the teacher at T = 1, nats/token")
    candidates = sorted(found["candidates"], key=lambda c: (c["alpha"], c["temperature"]))
    colours = dict(zip(sorted({c["temperature"] for c in candidates}), cycle(COLOURS.values()), strict=False))
    lines = dict(zip(sorted({c["alpha"] for c in candidates}), cycle(("o-", "s--", "^:", "D-.")), strict=False))
    for candidate in candidates:
        t, alpha = candidate["temperature"], candidate["alpha"]
        steps = [rung["step"] for rung in candidate["rungs"]]
        for on, key in zip(panels, ("nll", "kl"), strict=False):
            values = [rung[key] for rung in candidate["rungs"]]
            if None not in values:
                on.plot(steps, values, lines[alpha], color=colours[t], lw=1.3, ms=4, label=f"T {t:g}, alpha {alpha:g}")
    for on in panels[:2]:
        on.set_xscale("log", base=2)
        _ticks(on, {rung["step"] for c in candidates for rung in c["rungs"]})
    legend(panels[0], fontsize="small")
    _over_t(panels[2], candidates, found["by"], lines)
    return figure


def _over_t(on: Any, candidates: Sequence[Mapping[str, Any]], by: str, lines: Mapping[float, str]) -> None:
    """The measure that decides, at the first rung, which alone all candidates share."""
    for alpha, line in lines.items():
        same = [c for c in candidates if c["alpha"] == alpha]
        values = [c["rungs"][0][by] for c in same]
        on.plot([c["temperature"] for c in same], values, line, color=COLOURS["before"], ms=4, label=f"alpha {alpha:g}")
    on.set_xscale("log")
    on.set_xlabel("T")
    on.set_ylabel(f"{by.upper()} at step {candidates[0]['rungs'][0]['step']}")
    _ticks(on, {c["temperature"] for c in candidates})
    legend(on, fontsize="small")


def _ticks(on: Any, values: Any) -> None:
    """One for each value, and no other."""
    on.set_xticks(sorted(values), [f"{value:g}" for value in sorted(values)])
    on.minorticks_off()


def kept(retention: Mapping[str, Any]) -> Any:
    """Percent of the teacher's score that each model has on each task, with its interval; see `Retention`."""
    tasks = [task for task in retention["tasks"] if any(task["kept"].values())]
    if not tasks:
        return None
    models = [name for name in tasks[0]["kept"] if any(task["kept"].get(name) for task in tasks)]
    figure, on = axes("What was kept of the teacher", "", "% of its score", 8.4, 3.6)
    width = 0.8 / len(models)
    for i, name in enumerate(models):
        found = [(at, task["kept"][name]) for at, task in enumerate(tasks) if task["kept"].get(name)]
        places = [at + (i - (len(models) - 1) / 2) * width for at, _ in found]
        heights = [k["percent"] for _, k in found]
        spread = [
            [max(k["percent"] - k["low"], 0) for _, k in found],
            [max(k["high"] - k["percent"], 0) for _, k in found],
        ]
        on.bar(places, heights, width * 0.9, yerr=spread, capsize=3, color=COLOURS.get(name), ecolor=INK,
               label=name)  # fmt: skip
    on.axhline(100, lw=1, color=COLOURS["teacher"])
    on.set_xticks(range(len(tasks)), [task["task"].removeprefix("mini_") for task in tasks])
    on.grid(axis="x", visible=False)
    legend(on)
    return figure


def curve(found: Mapping[str, Any]) -> Any:
    """Held-out NLL and KL over tokens; see `data_curve`."""
    figure, (left, right) = axes("Quality over tokens", "tokens", "NLL of the labels, nats/token", 8.4, 3.2, 2)
    right.set_ylabel("KL to the teacher, nats/token")
    tokens = [point["tokens"] for point in found["points"]]
    left.plot(tokens, [point["nll"] for point in found["points"]], "o-", color=COLOURS["student"])
    known = [(point["tokens"], point["kl"]) for point in found["points"] if point["kl"] is not None]
    if known:
        right.plot(*zip(*known, strict=True), "o-", color=COLOURS["student"])
    return figure
