"""Count the provoked failures that `diagnose` names, and the false alarms on healthy runs, ten seeds of each.

    python diagnosis.py [seeds] [first seed]

The cases are those of the tests (tests/analysis/provoked.py): trained tiny models, each with one mistake. Thresholds
and estimators were chosen on seeds below 10 and from 100 to 109; these seeds are different.
"""

import sys
from pathlib import Path

import torch
from measure import save

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "analysis")]


def count_tokens(pair) -> tuple[dict[str, int], list]:
    """Register hooks that count the tokens that pass each model; return the counts and the hooks."""
    passed = {"teacher": 0, "student": 0}

    def counting(name):
        def hook(module, args, kwargs, output):
            passed[name] += kwargs["input_ids"].numel()

        return getattr(pair, name).register_forward_hook(hook, with_kwargs=True)

    return passed, [counting(name) for name in passed]


def main(seeds: int, first: int) -> None:
    """Diagnose every case of every seed and write results/diagnosis.json."""
    from provoked import CASES, healthy

    from hf_distill.analysis.diagnosis import diagnose

    torch.set_num_threads(1)
    named = {name: [] for name in CASES}
    others = {name: [] for name in CASES}
    alarms, forwards, false_positives = [], [], 0
    for seed in range(first, first + seeds):
        for name, make in {"healthy": healthy, **CASES}.items():
            pair, logs = make(seed)
            passed, hooks = count_tokens(pair)
            diagnosis = diagnose(pair, 4096, logs)
            for hook in hooks:
                hook.remove()
            forwards.append(max(passed.values()) / diagnosis.agreement.tokens)
            names = [verdict.name for verdict in diagnosis.verdicts]
            print(seed, name, names, flush=True)
            if name == "healthy":
                alarms += names
                false_positives += bool(names)
            else:
                named[name].append(name in names)
                others[name] += [other for other in names if other != name]
    save(
        "diagnosis",
        {
            "seeds": seeds,
            "first_seed": first,
            "named": {name: sum(hits) for name, hits in named.items()},
            "also_named": {name: {o: names.count(o) for o in sorted({*names})} for name, names in others.items()},
            "false_alarms": len(alarms),
            "healthy_runs_called_ill": false_positives,
            "tokens_through_each_model_per_token_compared": max(forwards),
        },
    )


if __name__ == "__main__":
    main(*(int(argument) for argument in (*sys.argv[1:], *("10", "200")[len(sys.argv) - 1 :])))
