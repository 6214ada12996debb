"""How many provoked failures are named, and how many healthy runs are called ill: ten of each, by seed.

    python diagnosis.py [seeds] [first seed]

The cases are those of the tests (tests/analysis/provoked.py): tiny models, really trained, each with one mistake.
Thresholds and estimators were chosen on seeds below 10 and from 100 to 109; these are others.
"""

import sys
from pathlib import Path

import torch
from measure import save

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "analysis")]


def counted(pair) -> tuple[dict[str, int], list]:
    """Tokens that go through each model from now on, and the hooks that count them."""
    passed = {"teacher": 0, "student": 0}

    def counting(name):
        def hook(module, args, kwargs, output):
            passed[name] += kwargs["input_ids"].numel()

        return getattr(pair, name).register_forward_hook(hook, with_kwargs=True)

    return passed, [counting(name) for name in passed]


def main(seeds: int, first: int) -> None:
    """Name them all."""
    from provoked import CASES, healthy

    from hf_distill.analysis.diagnosis import diagnose

    torch.set_num_threads(1)
    named = {name: [] for name in CASES}
    others = {name: [] for name in CASES}
    alarms, forwards, ill = [], [], 0
    for seed in range(first, first + seeds):
        for name, make in {"healthy": healthy, **CASES}.items():
            pair, logs = make(seed)
            passed, hooks = counted(pair)
            found = diagnose(pair, 4096, logs)
            for hook in hooks:
                hook.remove()
            forwards.append(max(passed.values()) / found.agreement.tokens)
            names = [verdict.name for verdict in found.verdicts]
            print(seed, name, names, flush=True)
            if name == "healthy":
                alarms += names
                ill += bool(names)
            else:
                named[name].append(name in names)
                others[name] += [other for other in names if other != name]
    save(
        "diagnosis",
        {
            "seeds": seeds,
            "first_seed": first,
            "named": {name: sum(found) for name, found in named.items()},
            "also_named": {name: {o: found.count(o) for o in sorted({*found})} for name, found in others.items()},
            "false_alarms": len(alarms),
            "healthy_runs_called_ill": ill,
            "tokens_through_each_model_per_token_compared": max(forwards),
        },
    )


if __name__ == "__main__":
    main(*(int(given) for given in (*sys.argv[1:], *("10", "200")[len(sys.argv) - 1 :])))
