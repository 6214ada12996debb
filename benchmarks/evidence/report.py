"""Write docs/evidence.md from the template and the results: python report.py."""

import re
from pathlib import Path
from typing import Any

import tables
from claims import claims
from plots import draw

from hf_distill.core.files import write_atomic
from hf_distill.core.io import read_json

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results" / "evidence"
DOCUMENT = HERE.parent.parent / "docs" / "evidence.md"


def results() -> dict[tuple[str, int], dict[str, Any]]:
    """Return the results by cell and seed."""
    contents = [read_json(file) for file in sorted(RESULTS.glob("*.json"))]
    return {(result["cell"], result["seed"]): result for result in contents}


def render() -> str:
    """Return the template with its tables filled in."""
    all_results = results()

    def table(match: re.Match[str]) -> str:
        make_table: Any = claims if match[1] == "claims" else getattr(tables, match[1])
        return make_table(all_results)

    return re.sub(r"\{\{(\w+)\}\}", table, (HERE / "template.md").read_text())


def write() -> None:
    """Write the page and its pictures."""
    draw(results())
    write_atomic(DOCUMENT, render())


if __name__ == "__main__":
    write()
