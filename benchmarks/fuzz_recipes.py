"""Mutated recipes through `hf-distill recipes validate`: how many end in a traceback, or in a line that says nothing.

    python fuzz_recipes.py [count] [first seed]

The mutations are those of the tests (tests/recipe/mutations.py), of which `make test` has a sample.
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "tests" / "recipe")]


def main(count: int, first: int) -> int:
    """Try them all; the number of faults."""
    from mutations import fault, mutated

    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            if found := fault(mutated(seed), Path(folder) / "mutated.yaml"):
                faults += 1
                print(f"seed {seed}: {found}", flush=True)
    print(f"{count} mutated recipes, {faults} faults")
    return faults


if __name__ == "__main__":
    given = [int(word) for word in sys.argv[1:]]
    sys.exit(main(*given, *(1000, 10_000)[len(given) :]) > 0)
