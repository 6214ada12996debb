"""The tables of docs/evidence.md, each a pure function of results: what the template names in double braces."""

from collections.abc import Mapping, Sequence
from math import log
from typing import Any

Results = Mapping[tuple[str, int], Mapping[str, Any]]
_HEAD = ("perplexity", "KL to teacher", "agreement", "gap closed")


def figures(results: Results, cell: str) -> list[dict[str, float]]:
    """Of a cell, for each seed: held-out perplexity, KL and agreement, and the share of the gap that was closed.

    The gap is that of nats a token between the student as it was cut and the teacher.
    """
    before = results["before", 0]["metrics"]
    start, end = log(before["perplexity"]), log(before["teacher_perplexity"])
    found = []
    for (name, _), result in sorted(results.items()):
        if name == cell:
            metrics = result["metrics"]
            closed = (start - log(metrics["perplexity"])) / (start - end)
            found.append({**{k: metrics[k] for k in ("perplexity", "kl", "agreement")}, "closed": closed})
    return found


def spread(values: Sequence[float], digits: int, percent: bool = False) -> str:
    """The mean, and the lowest and highest of several."""
    scale, sign = (100, " %") if percent else (1, "")
    told = f"{scale * sum(values) / len(values):.{digits}f}{sign}"
    if len(values) == 1:
        return told
    return f"{told} ({scale * min(values):.{digits}f} to {scale * max(values):.{digits}f})"


def row(results: Results, title: str, cell: str) -> str:
    """A line of a table; empty cells where it was not run."""
    found = figures(results, cell)
    if not found:
        return f"| {title} | not run | | | |"
    parts = (
        spread([f["perplexity"] for f in found], 2),
        spread([f["kl"] for f in found], 4),
        spread([f["agreement"] for f in found], 3),
        spread([f["closed"] for f in found], 1, percent=True),
    )
    return f"| {title} | {' | '.join(parts)} |"


def table(results: Results, rows: Sequence[tuple[str, str]], first: str = "") -> str:
    """Lines of cells under the same head."""
    head = [f"| {first} | {' | '.join(_HEAD)} |", "|---|---|---|---|---|"]
    return "\n".join(head + [row(results, title, cell) for title, cell in rows])


def labels(results: Results) -> str:
    """The mission's 7.1: hard labels, soft labels, features."""
    rows = [
        ("cut, not trained", "before"),
        ("hard labels alone", "hard"),
        ("distilled (T = 2, alpha = 0.5)", "distilled"),
        ("+ hidden states", "hidden"),
        ("+ hidden states and attention", "attention"),
        ("soft labels alone (T = 1, alpha = 1)", "pure"),
    ]
    teacher = results["before", 0]["metrics"]["teacher_perplexity"]
    return table(results, rows) + f"\n| teacher, 30 blocks | {teacher:.2f} | 0 | 1 | 100 % |"


def temperatures(results: Results) -> str:
    """2.3: T at alpha = 0.5."""
    cells = [(1, "temperature_1"), (2, "distilled"), (3, "temperature_3"), (4, "temperature_4"), (10, "temperature_10")]
    return table(_first(results), [(str(t), cell) for t, cell in cells], "T, alpha = 0.5")


def alphas(results: Results) -> str:
    """2.3: alpha at T = 2."""
    cells = [(0, "hard"), (0.3, "alpha_0.3"), (0.5, "distilled"), (0.9, "alpha_0.9"), (1, "alpha_1")]
    return table(_first(results), [(str(a), cell) for a, cell in cells], "alpha, T = 2")


def divergences(results: Results) -> str:
    """At T = 1 and alpha = 1, equal tokens."""
    names = ("reverse_kl", "js", "skew_kl", "total_variation", "adaptive_kl")
    return table(_first(results), [("forward_kl", "pure"), *((name, name) for name in names)], "divergence")


def quantised(results: Results) -> str:
    """8.3: what the teacher's bits cost its student."""
    rows = [("float32", "distilled"), ("INT8", "teacher_int8"), ("NF4", "teacher_nf4")]
    return table(_first(results), rows, "teacher")


def kinds(results: Results) -> str:
    """8.2, and teachers that move."""
    rows = [
        ("hard labels alone", "hard"),
        ("frozen, direct", "distilled"),
        ("frozen, by 25 and 20 blocks", "progressive"),
        ("online", "online"),
        ("mutual", "mutual"),
        ("its own average", "ema"),
        ("another view", "multi_view"),
        ("multi-token heads", "mtp"),
    ]
    return table(_first(results), rows, "teacher")


def tokens(results: Results) -> str:
    """7.3: quality over tokens, of one run."""
    run = results["long", 0]
    train = run["recipe"]["train"]
    each = train["per_device_train_batch_size"] * run["recipe"]["data"]["max_length"]
    start = log(results["before", 0]["metrics"]["perplexity"])
    end = log(run["curve"][-1]["eval_perplexity"])
    lines = ["| tokens, at most | perplexity | KL to teacher | share of the run's fall |", "|---|---|---|---|"]
    for point in run["curve"]:
        share = (start - log(point["eval_perplexity"])) / (start - end)
        told = (
            f"{point['step'] * each:,} | {point['eval_perplexity']:.2f} | {point['eval_kl']:.4f} | {100 * share:.0f} %"
        )
        lines.append(f"| {told} |")
    return "\n".join(lines)


def caches(results: Results) -> str:
    """Teachers on disk at T = 1 and alpha = 1; the online one beside them."""
    rows = [
        ("online", "pure"),
        ("hidden states", "cache_hidden"),
        ("12 draws", "cache_sampled_12"),
        ("top 12", "cache_top_12"),
        ("top 64", "cache_top_64"),
        ("hard labels alone", "hard"),
    ]
    return table(_first(results), rows, "what is stored")


def mixture(results: Results) -> str:
    """8.1: perplexity on both halves of the held-out rows, by what was trained on."""
    lines = ["| trained on | documentation | addresses |", "|---|---|---|"]
    for title, cell in (("documentation alone", "technical"), ("0.7 and 0.3", "mixed"), ("addresses alone", "general")):
        if (cell, 0) in results:
            metrics = results[cell, 0]["metrics"]
            both = f"{metrics['technical_perplexity']:.2f} | {metrics['general_perplexity']:.2f}"
            lines.append(f"| {title} | {both} |")
    return "\n".join(lines)


def peers(results: Results) -> str:
    """The same rows, order, start and tokens; pace and peaks of the processes that trained."""
    titles = {
        "ours_kl": "DistillSFTTrainer, forward KL",
        "gkd_kl": "TRL GKDTrainer, forward KL",
        "ours_js": "DistillSFTTrainer, JSD",
        "gkd_js": "TRL GKDTrainer, JSD",
        "trl_sft": "TRL SFTTrainer, hard labels",
    }
    head = ("perplexity", "KL to teacher", "tokens/s", "peak MiB over what stays")
    lines = [f"|  | {' | '.join(head)} |", "|---|---|---|---|---|"]
    for who, title in titles.items():
        runs = [r["metrics"] for (name, _), r in sorted(results.items()) if name == f"peer_{who}"]
        if runs:
            parts = (("perplexity", 2), ("kl", 4), ("tokens_per_second", 0), ("peak_mib_over_what_stays", 0))
            told = (spread([run[key] for run in runs], digits) for key, digits in parts)
            lines.append(f"| {title} | {' | '.join(told)} |")
    return "\n".join(lines)


def encoder(results: Results) -> str:
    """Accuracy on held-out rows of five topics."""
    runs = [result["metrics"] for (name, _), result in sorted(results.items()) if name == "encoder"]
    lines = ["|  | parameters | accuracy | of the teacher's |", "|---|---|---|---|"]
    titles = {"teacher": "teacher, 6 layers", "student": "student, 2 layers", "control": "the same, hard labels alone"}
    for who, title in titles.items():
        if runs:
            size = f"{runs[0][f'{who}_parameters'] / 1e6:.1f} M"
            kept = [run[who] / run["teacher"] for run in runs]
            told = spread([run[who] for run in runs], 3)
            lines.append(f"| {title} | {size} | {told} | {spread(kept, 1, percent=True)} |")
    return "\n".join(lines)


def _first(results: Results) -> Results:
    """The first seed alone, so that a table compares like with like."""
    return {key: value for key, value in results.items() if key[1] == 0}


_ALL = (labels, temperatures, alphas, divergences, quantised, kinds, tokens, caches, mixture, peers, encoder)
TABLES = {function.__name__: function for function in _ALL}
