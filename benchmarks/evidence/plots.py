"""Draw the pictures of docs/evidence.md from the results."""

from pathlib import Path

from cells import BY_ALPHA, BY_TEMPERATURE
from tables import Results, common_seeds, of, tokens_a_step

from hf_distill.report.figures import COLORS, axes

PICTURES = Path(__file__).parent.parent.parent / "docs" / "pictures"


def draw(results: Results) -> None:
    """Write all pictures as PNG files."""
    for picture in (labels, temperatures, tokens, peers):
        picture(results).savefig(PICTURES / f"evidence_{picture.__name__}.png", dpi=110)


def labels(results: Results):
    """Return a figure of perplexity and KL of every seed."""
    cells = {"hard labels": "hard", "distilled": "distilled", "+ hidden": "hidden", "+ attention": "attention"}
    cells |= {"T = 1, alpha = 1": "pure"}
    figure, both = axes("Every seed of five ways to train", "", "held-out perplexity", width=9, count=2)
    both[1].set_ylabel("KL to the teacher, nats/token")
    for axis, key in zip(both, ("perplexity", "kl"), strict=True):
        for place, cell in enumerate(cells.values()):
            values = [metrics[key] for metrics in of(results, cell)]
            colour = COLORS["control" if cell == "hard" else "student"]
            axis.plot([place] * len(values), values, "o", color=colour, alpha=0.8)
        axis.set_xticks(range(len(cells)), cells, rotation=20, ha="right")
    return figure


def temperatures(results: Results):
    """Mean perplexity and KL of the seeds over T, and over alpha."""
    figure, both = axes("Temperature and alpha", "", "held-out perplexity", width=9, count=2)
    for axis, cells, name in ((both[0], BY_TEMPERATURE, "T, at alpha = 0.5"), (both[1], BY_ALPHA, "alpha, at T = 2")):
        seeds = common_seeds(results, cells.values())
        mean = {
            key: [sum(results[cell, seed]["metrics"][key] for seed in seeds) / len(seeds) for cell in cells.values()]
            for key in ("perplexity", "kl")
        }
        axis.plot([*cells], mean["perplexity"], "o-", color=COLORS["student"])
        axis.set_xlabel(name)
        right = axis.twinx()
        right.plot([*cells], mean["kl"], "s--", color=COLORS["teacher"])
        right.grid(False)
    right.set_ylabel("KL to the teacher (dashed), nats/token")
    return figure


def tokens(results: Results):
    """Return a figure of perplexity over tokens, with and without a teacher; each seed is a curve."""
    figure, (axis,) = axes("Tokens against quality, every seed", "tokens", "held-out perplexity")
    for name, curve, title in (
        ("student", "curve", "distilled"),
        ("control", "control_curve", "hard labels alone"),
    ):
        for i, run in enumerate(run for (cell, _), run in sorted(results.items()) if cell == "long"):
            points = [point for point in run[curve] if point["step"]]
            x = [tokens_a_step(run) * point["step"] for point in points]
            y = [point["perplexity"] for point in points]
            axis.plot(x, y, "o-", color=COLORS[name], label="_" * (i > 0) + title, alpha=0.8)
    axis.axhline(results["before", 0]["metrics"]["teacher_perplexity"], color=COLORS["teacher"], label="teacher")
    axis.legend()
    return figure


def peers(results: Results):
    """Return a figure of speed and memory of every seed, compared with TRL."""
    peers = {"ours, KL": "ours_kl", "GKD, KL": "gkd_kl", "ours, JSD": "ours_js", "GKD, JSD": "gkd_js", "SFT": "trl_sft"}
    figure, both = axes("Beside TRL, every seed", "", "tokens/s", width=9, count=2)
    both[1].set_ylabel("peak, MiB over what stays")
    for axis, key in zip(both, ("tokens_per_second", "peak_mib_over_what_stays"), strict=True):
        for place, cell in enumerate(peers.values()):
            values = [metrics[key] for metrics in of(results, f"peer_{cell}")]
            colour = COLORS["student" if cell.startswith("ours") else "control"]
            axis.plot([place] * len(values), values, "o", color=colour, alpha=0.8)
        axis.set_xticks(range(len(peers)), peers, rotation=20, ha="right")
        axis.set_ylim(bottom=0)
    return figure
