"""The tables of docs/evidence.md: `{{name}}` in the template is replaced by what the function `name` returns."""

from collections.abc import Iterable, Mapping, Sequence
from math import log
from typing import Any

from cells import BY_ALPHA, BY_TEMPERATURE, SHAPES
from compute import PRETRAINING, share

Results = Mapping[tuple[str, int], Mapping[str, Any]]


def of(results: Results, cell: str) -> list[Mapping[str, Any]]:
    """Return the metrics of a cell, one entry for each seed."""
    return [result["metrics"] for (name, _), result in sorted(results.items()) if name == cell]


def closed(results: Results, perplexity: float) -> float:
    """Return the share of the gap in nats per token that is closed, from the student before training to the teacher."""
    before = results["before", 0]["metrics"]
    start, end = log(before["perplexity"]), log(before["teacher_perplexity"])
    return (start - log(perplexity)) / (start - end)


def spread(values: Sequence[float], digits: int, percent: bool = False) -> str:
    """Return the mean as text, with minimum and maximum if their texts differ."""
    scale, sign = (100, " %") if percent else (1, "")
    mean, low, high = (
        f"{scale * value:,.{digits}f}" for value in (sum(values) / len(values), min(values), max(values))
    )
    return f"{mean}{sign}" + ("" if low == high else f" ({low} to {high})")


def lines(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    all_rows = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in all_rows)


def common_seeds(results: Results, cells: Iterable[str]) -> list[int]:
    """Return the seeds with which all cells were run."""
    return sorted(set.intersection(*({seed for name, seed in results if name == cell} for cell in cells)))


def students(results: Results, rows: Mapping[str, str], first: str = " ") -> str:
    """Return a table of held-out metrics of students, with the seeds that all its rows have.

    rows: cell of each title
    """
    seeds = common_seeds(results, (cell for cell in rows.values() if cell != "before"))

    def row(title: str, cell: str) -> list[str]:
        metrics = [results[cell, seed]["metrics"] for seed in ((0,) if cell == "before" else seeds)]
        parts = (("perplexity", 2), ("kl", 4), ("agreement", 3))
        spreads = [spread([each[key] for each in metrics], digits) for key, digits in parts]
        return [title, *spreads, spread([closed(results, each["perplexity"]) for each in metrics], 1, percent=True)]

    head = (first, "perplexity", "KL to teacher", "agreement", "gap closed")
    return lines(head, [row(title, cell) for title, cell in rows.items()])


def tokens_a_step(run: Mapping[str, Any]) -> float:
    """Return the mean number of tokens in a step of a run."""
    return run["recipe"]["train"]["per_device_train_batch_size"] * run["data"]["tokens_per_row"]


def setting(results: Results) -> str:
    """Return the number of steps, rows and tokens that each student is trained with, as text."""
    run = results["distilled", 0]
    batch, length = run["recipe"]["train"]["per_device_train_batch_size"], run["data"]["tokens_per_row"]
    return f"{run['recipe']['train']['max_steps']} steps of {batch} rows of {length:.0f} tokens"


def labels(results: Results) -> str:
    """Return the table of hard labels, soft labels and features."""
    rows = {
        "pruned, before training": "before",
        "hard labels only": "hard",
        "distilled (T = 2, alpha = 0.5)": "distilled",
        "+ hidden states": "hidden",
        "+ hidden states and attention": "attention",
        "soft labels only (T = 1, alpha = 1)": "pure",
    }
    teacher = results["before", 0]["metrics"]["teacher_perplexity"]
    return students(results, rows) + f"\n| teacher, 30 layers | {teacher:.2f} | 0 | 1 | 100 % |"


def shapes(results: Results) -> str:
    """Return the table of students of equal size by shape, with the teacher and with hard labels only."""
    rows = {title: distilled for title, (distilled, _) in SHAPES.items()}
    rows |= {f"{title}; hard labels only": hard for title, (_, hard) in SHAPES.items()}
    return students(results, rows, "81 million parameters")


def rates(results: Results) -> str:
    """Return the table of learning rates with hard labels only."""
    rows = {"4e-4": "hard_4e-4", "8e-4, used": "hard", "16e-4": "hard_16e-4"}
    return students(results, rows, "hard labels only, learning rate")


def temperatures(results: Results) -> str:
    """Return the table of temperatures at alpha = 0.5."""
    return students(results, {str(t): cell for t, cell in BY_TEMPERATURE.items()}, "T, alpha = 0.5")


def alphas(results: Results) -> str:
    """Return the table of alpha at T = 2."""
    return students(results, {str(a): cell for a, cell in BY_ALPHA.items()}, "alpha, T = 2")


def divergences(results: Results) -> str:
    """Return the table of divergences at T = 1 and alpha = 1, with equal tokens."""
    names = ("reverse_kl", "js", "skew_kl", "total_variation", "adaptive_kl")
    return students(results, {"forward_kl": "pure"} | {name: name for name in names}, "divergence")


def quantised(results: Results) -> str:
    """Return the table of students of quantized teachers."""
    return students(results, {"float32": "distilled", "INT8": "teacher_int8", "NF4": "teacher_nf4"}, "teacher")


def chains(results: Results) -> str:
    """Return the table of progressive distillation."""
    rows = {
        "30 → 15 layers": "distilled",
        "30 → 25 → 20 → 15, the same total tokens": "progressive",
        "30 → 25 → 20 → 15, the same tokens per student": "progressive_each",
    }
    return students(results, rows, "chain")


def moving(results: Results) -> str:
    """Return the table of online and self-distillation."""
    rows = {
        "none: hard labels only": "hard",
        "frozen": "distilled",
        "online: jointly trained on the labels": "online",
        "mutual: a peer, both teach each other": "mutual",
        "EMA of the student": "ema",
        "multi-view: the student on the unchanged text": "multi_view",
        "heads for later tokens (MTP)": "mtp",
    }
    return students(results, rows, "teacher")


def fall(curve: Sequence[Mapping[str, float]]) -> list[float]:
    """Return the share of the whole improvement of a run, in nats per token, that is reached at each point."""
    nats = [log(point["perplexity"]) for point in curve]
    return [(nats[0] - value) / (nats[0] - nats[-1]) for value in nats]


def tokens(results: Results) -> str:
    """Return the table of quality over training tokens of the long runs and their controls."""
    runs = [results["long", seed] for seed in common_seeds(results, ["long"])]
    step_tokens = tokens_a_step(runs[0])
    falls = [fall(run["curve"]) for run in runs]
    rows = []
    for i, point in enumerate(runs[0]["curve"]):
        figures = [spread([run["curve"][i][key] for run in runs], n) for key, n in (("perplexity", 2), ("kl", 4))]
        figures.append(spread([shares[i] for shares in falls], 0, percent=True))
        # Controls are not evaluated before training, where they equal the students.
        hard = [each["perplexity"] for run in runs for each in run["control_curve"] if each["step"] == point["step"]]
        figures.append(spread(hard, 2) if hard else "")
        share_of_tokens = f"{100 * point['step'] / runs[0]['curve'][-1]['step']:.0f} %"
        rows.append((f"{point['step'] * step_tokens:,.0f}", share_of_tokens, *figures))
    head = (
        "tokens",
        "share of tokens",
        "perplexity",
        "KL to teacher",
        "share of the improvement",
        "perplexity, hard labels only",
    )
    return lines(head, rows)


def compute(results: Results) -> str:
    """Return the table of FLOP by the rule of thumb, and their share of pretraining the student on 2e12 tokens."""
    pair, steps = results["before", 0]["compute"], results["before", 0]["steps"]
    run = results["distilled", 0]
    here = steps * tokens_a_step(run)
    sizes = (pair["teacher"]["parameters"], pair["student"]["parameters"])
    cases = {
        "70B → 8B": (70e9, 8e9, 20e9),
        "135M → 81M": (*sizes, 20e9),
        "135M → 81M, as run here": (*sizes, here),
    }
    rows = []
    for title, (teacher, student, count) in cases.items():
        total, part = share(teacher, student, count)
        times = (2 * teacher + 6 * student) / (6 * student)
        rows.append((title, f"{count:,.0f}", f"{total:.2e}", f"{times:.2f}", f"{100 * part:.2g} %"))
    head = (
        "pair",
        "tokens",
        "FLOP",
        "relative to a step without a teacher",
        f"share of pretraining on {PRETRAINING:.0e} tokens",
    )
    return lines(head, rows)


def caches(results: Results) -> str:
    """Return the table of teacher caches and the running teacher, at T = 1 and alpha = 1."""
    rows = {
        "none: running teacher": "pure",
        "hidden states": "cache_hidden",
        "12 samples": "cache_sampled_12",
        "50 samples": "cache_sampled_50",
        "top 12": "cache_top_12",
        "top 64": "cache_top_64",
        "hard labels only": "hard",
    }
    return students(results, with_bytes(results, rows), "cache")


def caches_with_labels(results: Results) -> str:
    """Return the table of a cache of 12 samples and the running teacher, at T = 1 and alpha = 0.5."""
    rows = {"none: running teacher": "temperature_1", "12 samples": "cache_sampled_12_half"}
    return students(results, with_bytes(results, rows), "cache, with hard labels")


def with_bytes(results: Results, rows: Mapping[str, str]) -> dict[str, str]:
    """Return titles and cells, where the titles of caches also have the bytes per token."""
    sizes = results["cache_bytes", 0]["metrics"]
    return {
        f"{title}, {sizes[cell.removesuffix('_half')]:,.1f} bytes per token"
        if cell.startswith("cache_")
        else title: cell
        for title, cell in rows.items()
    }


def mixture(results: Results) -> str:
    """Return the table of perplexity on each kind of text, by the text that students were trained on."""
    titles = {"documentation only": "technical", "0.7 and 0.3": "mixed", "addresses only": "general"}
    seeds, kinds = common_seeds(results, titles.values()), ("technical", "general")
    rows = [
        (
            title,
            *(spread([results[cell, seed]["metrics"][f"{kind}_perplexity"] for seed in seeds], 2) for kind in kinds),
        )
        for title, cell in titles.items()
    ]
    return lines(("trained on", "documentation", "addresses"), rows)


def peers_of(results: Results, peer: str) -> list[Mapping[str, Any]]:
    """Return the metrics of one of the compared trainers, one entry for each seed."""
    return of(results, f"peer_{peer}")


def peers(results: Results) -> str:
    """Return the table of trainers compared on the same rows, order, initial student and tokens."""
    titles = {
        "ours_kl": "DistillSFTTrainer, forward KL",
        "gkd_kl": "TRL GKDTrainer, forward KL",
        "ours_js": "DistillSFTTrainer, JSD",
        "gkd_js": "TRL GKDTrainer, JSD",
        "trl_sft": "TRL SFTTrainer, hard labels",
    }
    parts = (("perplexity", 2), ("kl", 4), ("tokens_per_second", 0), ("peak_mib_over_what_stays", 0))
    rows = []
    for peer, title in titles.items():
        if runs := peers_of(results, peer):
            rows.append((title, *(spread([run[key] for run in runs], digits) for key, digits in parts)))
    return lines((" ", "perplexity", "KL to teacher", "tokens/s", "peak, MiB beyond weights and optimizer"), rows)


def encoder(results: Results) -> str:
    """Return the table of accuracy on held-out rows of five topics."""
    titles = {"teacher": "teacher, 6 layers", "student": "student, 2 layers", "control": "the same, hard labels only"}
    runs, rows = of(results, "encoder"), []
    for role, title in titles.items():
        if runs:
            relative_accuracy = spread([run[role] / run["teacher"] for run in runs], 1, percent=True)
            size = f"{runs[0][f'{role}_parameters'] / 1e6:.1f} M"
            rows.append((title, size, spread([run[role] for run in runs], 3), relative_accuracy))
    return lines((" ", "parameters", "accuracy", "relative to the teacher"), rows)


def answers(results: Results) -> str:
    """Return the table of sequence-level distillation: author of the answers and kind of labels, at equal tokens."""
    titles = {
        "before": "pruned, before training",
        "hard_data": "hard labels, answers of the data",
        "hard_teacher": "hard labels, answers of the teacher",
        "soft_data": "soft labels, answers of the data",
        "soft_teacher": "soft labels, answers of the teacher",
        "soft_both": "soft labels, both in turn",
    }
    parts = (("data_perplexity", 2), ("data_kl", 3), ("teacher_perplexity", 2), ("teacher_kl", 3), ("accuracy", 3))
    rows = []
    for name, title in titles.items():
        if runs := of(results, f"answers_{name}"):
            rows.append((title, *(spread([run[key] for run in runs], digits) for key, digits in parts)))
    if runs := of(results, "answers_before"):
        first = runs[0]
        values = (first["data_teacher_perplexity"], first["teacher_teacher_perplexity"], first["teacher_accuracy"])
        rows.append(("teacher, 30 layers", f"{values[0]:.2f}", "0", f"{values[1]:.2f}", "0", f"{values[2]:.3f}"))
    head = (
        "trained on",
        "perplexity, data",
        "KL, data",
        "perplexity, teacher's text",
        "KL, teacher's text",
        "accuracy",
    )
    return lines(head, rows)


def other_types(results: Results) -> str:
    """Return the table of other model types: metrics of teacher, distilled student, and student on labels alone."""
    settings = {
        "digits": "images of digits, ViT of 6 layers into 2: accuracy",
        "relevance": "relevance for a query, MiniLM of 6 layers into 2: rank correlation",
        "whisper": "speech, whisper-base with 2 of its 6 decoder layers: word error rate",
    }
    rows = []
    for cell, title in settings.items():
        if runs := of(results, cell):
            sizes = [f"{runs[0][f'{role}_parameters'] / 1e6:.2f} M" for role in ("teacher", "student")]
            values = [spread([run[role] for run in runs], 3) for role in ("teacher", "student", "control")]
            rows.append((title, " into ".join(sizes), *values))
    return lines((" ", "parameters", "teacher", "student", "the same, labels only"), rows)
