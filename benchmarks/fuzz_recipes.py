"""Validate mutated recipes, and count the tracebacks and the error messages that do not name the problem.

    python fuzz_recipes.py [count] [first seed]

The mutations are those of the tests (tests/recipe/mutations.py), of which `make test` runs a sample.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "recipe")]


def main(count: int, first: int) -> int:
    """Validate all mutated recipes and return the number of faults."""
    from mutations import fault, mutated

    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            if message := fault(mutated(seed), Path(folder) / "mutated.yaml"):
                faults += 1
                print(f"seed {seed}: {message}", flush=True)
    print(f"{count} mutated recipes, {faults} faults")
    return faults


if __name__ == "__main__":
    arguments = [int(argument) for argument in sys.argv[1:]]
    sys.exit(main(*arguments, *(1000, 10_000)[len(arguments) :]) > 0)
