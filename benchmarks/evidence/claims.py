"""The table of claims in docs/evidence.md: each claim, what was measured, and a verdict computed from the results."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import log
from typing import Any

from cells import BY_ALPHA, BY_TEMPERATURE
from compute import share
from tables import Results, closed, common_seeds, fall, lines, of, peers_of, spread

HOLDS, NOT, EVEN = "holds", "**does not hold here**", "no difference beyond the range of seeds"
COMMON, OURS = "common", "this project"
Claim = tuple[str, str, str, str]


def claims(results: Results) -> str:
    """Return the table of all claims with their verdicts."""
    checks: Sequence[Callable[[Results], Claim]] = (
        soft, half_of_the_gap, features, temperature, balance, quantised, progressive, early, computing,
        shape_of_student, pruned_start, draws, top_12, cached, mixed, quality_of_peers, pace_of_peers, memory_of_peers,
        partial(with_teacher, "encoder", "text classifier", "accuracy"),
        partial(with_teacher, "digits", "image classifier", "accuracy"),
        partial(with_teacher, "relevance", "regression model", "rank correlation"),
        partial(with_teacher, "whisper", "speech recognizer", "word error rate"),
    )  # fmt: skip
    return lines(("claim", "source", "measured here", "verdict"), [check(results) for check in checks])


def every(results: Results, cell: str, key: str = "perplexity") -> list[float]:
    """Return a metric of a cell for each of its seeds."""
    return [metrics[key] for metrics in of(results, cell)]


def mean(values: Sequence[float]) -> float:
    """Return the mean of some values."""
    return sum(values) / len(values)


def noise(results: Results, cell: str) -> float:
    """Return the largest perplexity over the seeds of a cell relative to the smallest, minus 1."""
    perplexities = every(results, cell)
    return max(perplexities) / min(perplexities) - 1


def seeds_alone(results: Results, cell: str) -> str:
    """Return the range of perplexity over the seeds of a cell as text."""
    return f"range of seeds {100 * noise(results, cell):.1f} %"


def over_seeds(results: Results, cell: str, other: str, key: str = "perplexity") -> list[float]:
    """Relative change of a metric at each seed that both cells have."""
    seeds = [seed for name, seed in sorted(results) if name == cell and (other, seed) in results]
    return [results[cell, seed]["metrics"][key] / results[other, seed]["metrics"][key] - 1 for seed in seeds]


def as_percent(changes: Sequence[float]) -> str:
    """Mean, and lowest and highest, of relative changes as text."""
    text = f"{100 * mean(changes):+.1f} %"
    return text if len(changes) == 1 else f"{text} ({100 * min(changes):+.1f} to {100 * max(changes):+.1f})"


def against(results: Results, cell: str, other: str) -> tuple[str, bool]:
    """Return mean perplexity and KL of two cells as text, and whether every seed of `cell` is below `other`."""
    text, apart = [], True
    for key, name, digits in (("perplexity", "perplexity", 2), ("kl", "KL", 3)):
        one, two = every(results, cell, key), every(results, other, key)
        text.append(f"{name} {mean(one):.{digits}f} against {mean(two):.{digits}f}")
        apart = apart and max(one) < min(two)
    return ", ".join(text), apart


def soft(results: Results) -> Claim:
    """Compare perplexity and KL of students with soft and with hard labels, over all seeds."""
    text, apart = against(results, "distilled", "hard")
    return "Soft labels beat hard labels", COMMON, text, f"{HOLDS} for every seed" if apart else NOT


def shape_of_student(results: Results) -> Claim:
    """Compare pruning of depth and width with pruning of depth alone, at equal parameters and over all seeds."""
    text, apart = against(results, "depth_and_width", "distilled")
    claim = "Pruning depth and width is better than depth alone at equal parameters"
    return claim, "2407.14679", text, f"{HOLDS} for every seed" if apart else NOT


def pruned_start(results: Results) -> Claim:
    """Compare a pruned student with one of the same shape and random initial weights, after the same tokens."""
    text, apart = against(results, "depth_and_width", "random_start")
    claim = "A student pruned from the teacher needs far fewer tokens than one from random weights"
    return claim, "2407.14679", f"at equal tokens, {text}", HOLDS if apart else NOT


def half_of_the_gap(results: Results) -> Claim:
    """Compute how much of the gap between the student on hard labels and the teacher distillation closes."""
    end = log(results["before", 0]["metrics"]["teacher_perplexity"])
    hard, distilled = (log(mean(every(results, cell))) for cell in ("hard", "distilled"))
    part = (hard - distilled) / (hard - end)
    text = f"{100 * part:.0f} % of the gap left by hard labels, in nats per token"
    return (
        "A teacher closes half of the gap that hard labels leave",
        COMMON,
        text,
        HOLDS if part >= 0.5 else NOT,
    )


def features(results: Results) -> Claim:
    """Compare losses on logits and hidden states with losses on logits alone, separately for each seed."""
    plain, hidden = ([closed(results, p) for p in every(results, cell)] for cell in ("distilled", "hidden"))
    points = [100 * (with_it - without) for with_it, without in zip(hidden, plain, strict=True)]
    text = f"{', '.join(f'{point:+.2f}' for point in points)} points of the gap closed, seed by seed"
    less = "smaller improvement, for every seed" if min(points) > 0 else EVEN if max(points) > 0 else NOT
    return "Features add 1 to 3 %", COMMON, text, HOLDS if min(points) >= 1 else less


def temperature(results: Results) -> Claim:
    """Check whether T = 2 is the best temperature at alpha = 0.5."""
    return "T = 2 is best", COMMON, *lowest(results, "T", BY_TEMPERATURE, 2)


def balance(results: Results) -> Claim:
    """Check whether alpha = 0.5 is the best weight at T = 2."""
    return "alpha = 0.5 is best", COMMON, *lowest(results, "alpha", BY_ALPHA, 0.5)


def lowest(results: Results, name: str, cells: Mapping[Any, str], claimed: float) -> tuple[str, str]:
    """Return the values at which the mean perplexity and KL over the seeds are lowest, and the verdict on `claimed`.

    A claim holds for a metric if `claimed` is best for every seed; if it is best for some seeds only, or on the mean
    only, the seeds do not decide.
    """
    seeds, texts, verdicts = common_seeds(results, cells.values()), [], {}
    for key, metric in (("perplexity", "perplexity"), ("kl", "KL")):
        by_value = {value: [results[cell, seed]["metrics"][key] for seed in seeds] for value, cell in cells.items()}
        best = min(by_value, key=lambda value: mean(by_value[value]))
        best_of_seed = [min(by_value, key=lambda value: by_value[value][i]) for i in range(len(seeds))]
        count = f" ({best_of_seed.count(best)} of {len(seeds)} seeds)" if len(seeds) > 1 else ""
        texts.append(f"lowest {metric} at {name} = {best}{count}")
        wins = best_of_seed.count(claimed)
        verdicts[metric] = HOLDS if wins == len(seeds) else EVEN if wins or best == claimed else "does not hold"
    text, (perplexity, kl) = ", ".join(texts), verdicts.values()
    if perplexity == kl:
        return text, NOT if kl == "does not hold" else kl
    return text, "; ".join(f"{metric}: {verdict}" for metric, verdict in verdicts.items())


def quantised(results: Results) -> Claim:
    """Compare students of INT8 and NF4 teachers with students of the same teacher in float32, seed by seed."""
    int8, nf4 = (over_seeds(results, f"teacher_{bits}", "distilled") for bits in ("int8", "nf4"))
    text = f"perplexity {as_percent(int8)} with INT8, {as_percent(nf4)} with NF4; {seeds_alone(results, 'distilled')}"
    return "A 4-bit teacher costs nothing", COMMON, text, HOLDS if mean(nf4) <= noise(results, "distilled") else NOT


def progressive(results: Results) -> Claim:
    """Compare chains of students with direct distillation, seed by seed."""
    cells = {"the same total tokens": "progressive", "the same tokens per student": "progressive_each"}
    changes = {
        title: [over_seeds(results, cell, "distilled", key) for key in ("perplexity", "kl")]
        for title, cell in cells.items()
    }
    text = "; ".join(
        f"perplexity {as_percent(p)}, KL {as_percent(kl)} at {title}" for title, (p, kl) in changes.items()
    )
    is_better = any(max(p) < -0.02 and max(kl) < 0 for p, kl in changes.values())
    return "Chains are 2 to 3 % better", COMMON, text, HOLDS if is_better else NOT


def early(results: Results) -> Claim:
    """Return the share of a run's improvement that a tenth of its tokens gives."""
    shares, ratios = [], []
    for curve in [result["curve"] for (name, _), result in sorted(results.items()) if name == "long"]:
        at = next(i for i, point in enumerate(curve) if point["step"] >= curve[-1]["step"] / 10)
        shares.append(fall(curve)[at])
        ratios.append(curve[-1]["perplexity"] / curve[at]["perplexity"])
    text = (
        f"{spread(shares, 0, percent=True)} of the improvement in nats, "
        f"{spread(ratios, 0, percent=True)} as the ratio of final to early perplexity"
    )
    verdict = HOLDS if min(shares) >= 0.93 else NOT
    return "A tenth of the tokens gives 93 % of the quality", COMMON, text, verdict


def computing(results: Results) -> Claim:
    """Estimate the share of pretraining's FLOP with the rule of thumb, at 1 % of the tokens."""
    pair = results["before", 0]["compute"]
    large = share(70e9, 8e9, 20e9)[1]
    here = share(pair["teacher"]["parameters"], pair["student"]["parameters"], 20e9)[1]
    text = f"{100 * large:.1f} % for 70B → 8B by the rule, {100 * here:.1f} % for this pair, both at 1 % of the tokens"
    return (
        "3 to 5 % of pretraining's compute",
        COMMON,
        text,
        f"{HOLDS}, as arithmetic" if large < 0.05 else NOT,
    )


def draws(results: Results) -> Claim:
    """Compare students of a cache of 12 samples with those of the running teacher, separately for each seed."""
    by, kl = (over_seeds(results, "cache_sampled_12", "pure", key) for key in ("perplexity", "kl"))
    text = f"perplexity {as_percent(by)}, KL {as_percent(kl)}; {seeds_alone(results, 'pure')} of perplexity"
    verdict = HOLDS if mean(by) <= noise(results, "pure") else NOT
    return "12 samples teach as well as the full distribution", "2503.16870", text, verdict


def top_12(results: Results) -> Claim:
    """Compare a cache of the 12 most probable ids with hard labels, seed by seed."""
    perplexity, kl = (over_seeds(results, "cache_top_12", "hard", key) for key in ("perplexity", "kl"))
    text = f"perplexity {as_percent(perplexity)}, KL {as_percent(kl)} relative to hard labels"
    is_worse = [min(changes) > 0 for changes in (perplexity, kl)]
    verdict = HOLDS if all(is_worse) else f"{HOLDS} for perplexity, not for KL" if is_worse[0] else NOT
    return "The top 12 are worse than hard labels", "2503.16870", text, verdict


def cached(results: Results) -> Claim:
    """Compare students of unbiased caches with those of the running teacher."""
    cells = {"hidden states": "hidden", "12 samples": "sampled_12", "50 samples": "sampled_50"}
    by = {title: over_seeds(results, f"cache_{cell}", "pure") for title, cell in cells.items()}
    text = "perplexity: " + ", ".join(f"{title} {as_percent(changes)}" for title, changes in by.items())
    within = [title for title, changes in by.items() if max(changes) <= 0.01]
    verdict = HOLDS if len(within) == len(by) else f"{HOLDS} for {' and '.join(within)} only" if within else NOT
    return "Unbiased caches are within 1 % of the running teacher", OURS, text, verdict


def mixed(results: Results) -> Claim:
    """Compare a mixture of task and general text with either alone, seed by seed."""
    retained, costs = [], []
    for seed in common_seeds(results, ("technical", "general", "mixed")):
        task, general, both = (results[cell, seed]["metrics"] for cell in ("technical", "general", "mixed"))
        by_task, by_general, by_both = (log(run["general_perplexity"]) for run in (task, general, both))
        retained.append((by_task - by_both) / (by_task - by_general))
        costs.append(both["technical_perplexity"] / task["technical_perplexity"] - 1)
    text = (
        f"{spread(retained, 0, percent=True)} of it in nats, at {as_percent(costs)} task perplexity relative to the "
        "task only"
    )
    return "0.3 of general text keeps most of general ability", COMMON, text, HOLDS if min(retained) > 0.5 else NOT


def pair(results: Results, key: str, compare: Callable[[float, float], float]) -> dict[str, float]:
    """Return `compare(ours, TRL's)` of the means over seeds of a metric, for each divergence."""
    runs = {name: (peers_of(results, f"ours_{end}"), peers_of(results, f"gkd_{end}")) for name, end in _ENDS.items()}
    return {
        name: compare(mean([run[key] for run in ours]), mean([run[key] for run in theirs]))
        for name, (ours, theirs) in runs.items()
    }


_ENDS = {"forward KL": "kl", "JSD": "js"}


def quality_of_peers(results: Results) -> Claim:
    """Compare perplexity and KL of students of `DistillSFTTrainer` and TRL's `GKDTrainer`."""
    keys = ("perplexity", "kl")
    by: Mapping[str, Any] = {key: pair(results, key, lambda ours, theirs: ours / theirs - 1) for key in keys}
    text = "; ".join(
        f"{name}: perplexity {100 * by['perplexity'][name]:+.1f} %, KL {100 * by['kl'][name]:+.1f} %" for name in _ENDS
    )
    worst = max(value for by_divergence in by.values() for value in by_divergence.values())
    verdict = HOLDS if worst <= 0 else EVEN if worst <= noise(results, "peer_ours_kl") else NOT
    return "Students are at least equal to TRL's at equal tokens", OURS, text, verdict


def pace_of_peers(results: Results) -> Claim:
    """Compare the tokens per second of `DistillSFTTrainer` and TRL's `GKDTrainer`."""
    by = pair(results, "tokens_per_second", lambda ours, theirs: ours / theirs)
    text = ", ".join(f"{name} {value:.2f}" for name, value in by.items())
    return "At least 1.2 times TRL's tokens/s", OURS, text, HOLDS if min(by.values()) >= 1.2 else NOT


def memory_of_peers(results: Results) -> Claim:
    """Compare the peak memory of `DistillSFTTrainer` and TRL's `GKDTrainer`."""
    by = pair(results, "peak_mib_over_what_stays", lambda ours, theirs: ours / theirs)
    text = ", ".join(f"{name} {value:.2f}" for name, value in by.items())
    claim = "At most half of TRL's peak beyond weights, gradients and optimizer"
    return claim, OURS, text, HOLDS if max(by.values()) <= 0.5 else NOT


def with_teacher(cell: str, student: str, metric: str, results: Results) -> Claim:
    """Compare a student of another model type, trained with a teacher, with the same student on labels alone."""
    runs = of(results, cell)
    taught, control = ([run[role] for run in runs] for role in ("student", "control"))
    sign = -1 if metric == "word error rate" else 1  # the smallest is the best
    text = f"{metric} {mean(taught):.3f} against {mean(control):.3f}"
    least, most = min(sign * value for value in taught), max(sign * value for value in taught)
    best, worst = max(sign * value for value in control), min(sign * value for value in control)
    verdict = HOLDS if least > best else NOT if most < worst else EVEN
    return f"A teacher helps a small {student}", OURS, text, verdict
