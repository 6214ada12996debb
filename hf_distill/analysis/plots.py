"""Plots of what a run logged and of what was found out about it: matplotlib figures, None where there is nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from .canvas import COLOURS, axes, legend

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
        on.set_xticks([a["temperature"] for a in at], [f"{a['temperature']:g}" for a in at])
        on.minorticks_off()
    legend(right)
    return figure


def search(found: Mapping[str, Any]) -> Any:
    """Each candidate's held-out NLL and KL over its steps; see `find_temperature`."""
    figure, (left, right) = axes("Temperature and alpha", "step", "NLL of the labels, nats/token", 8.4, 3.6, 2)
    right.set_ylabel("KL to the teacher, nats/token")
    for candidate in found["candidates"]:
        steps = [rung["step"] for rung in candidate["rungs"]]
        name = f"T {candidate['temperature']:g}, alpha {candidate['alpha']:g}"
        for on, key in ((left, "nll"), (right, "kl")):
            on.plot(steps, [rung[key] for rung in candidate["rungs"]], "o-", lw=1.3, ms=4, label=name)
    legend(left, fontsize="small")
    return figure
